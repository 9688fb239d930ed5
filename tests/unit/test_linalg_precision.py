"""Solves and sums never lose bits to TF32 or bf16, also where the process allows both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forgetless.linalg import gram
from forgetless.linalg.lowrank import project_and_balance
from forgetless.linalg.moments import SecondMoment, output_energy
from forgetless.linalg.precision import full_precision
from forgetless.linalg.subspace import contrast_basis, leakage, null_basis
from forgetless.methods import make_method
from forgetless.methods.base import LayerWeights, SiteStatistics


def settings() -> tuple[str, str]:
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return matmuls[0].fp32_precision, matmuls[1].fp32_precision


@pytest.fixture
def narrow_matmuls() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


class Products(TorchDispatchMode):
    """Notes the settings under which matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "mm" in str(func) or "linear" in str(func):
            self.seen.append(settings())
        return func(*args, **(kwargs or {}))


def moment() -> SecondMoment:
    found = SecondMoment.zeros(6)
    found.add_(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    return found


MOMENT = moment()


def start(name: str) -> None:
    method = make_method({"name": name, "rank": 2})
    layer = LayerWeights("layer", torch.ones(8, 6).tril(), None)
    method.init(layer, SiteStatistics(MOMENT, MOMENT), torch.Generator())


@pytest.mark.parametrize(
    "solve",
    [
        lambda: output_energy(torch.ones(4, 6), torch.eye(6)),
        lambda: leakage(null_basis(torch.eye(6), 2)[0], torch.eye(6)),
        lambda: project_and_balance(torch.ones(4, 6), torch.eye(6)[:, :2]),
        lambda: contrast_basis(torch.ones(4, 6), torch.eye(6), 2),
        lambda: start("lora-null"),
        lambda: start("sc-lora"),
    ],
)
@pytest.mark.usefixtures("narrow_matmuls")
def test_products_of_a_solve_are_never_narrowed(solve: Callable[[], object]) -> None:
    before = settings()
    assert "ieee" not in before
    with Products() as products:
        solve()
    assert products.seen
    assert set(products.seen) == {("ieee", "ieee")}
    assert settings() == before


@pytest.mark.parametrize("width", [6, 700])
@pytest.mark.usefixtures("narrow_matmuls")
def test_a_moment_is_summed_in_float32_whatever_the_process_allows(width: int) -> None:
    before = settings()
    x_TD = torch.randn(3000, width, generator=torch.Generator().manual_seed(0))
    found = SecondMoment.zeros(width)
    found.add_(x_TD)
    exact_DD = x_TD.double().T @ x_TD.double() / 3000
    # Factors in bfloat16 would leave 6e-5.
    assert (found.mean_DD().double() - exact_DD).norm() < 1e-6 * exact_DD.norm()
    assert settings() == before


@pytest.fixture
def asked_anew() -> Iterator[None]:
    gram._multiplies_float32_anyway.cache_clear()
    yield
    gram._multiplies_float32_anyway.cache_clear()


@pytest.mark.parametrize(
    ("kind", "capabilities"),
    [
        ("with AMX", {"avx512_f": True, "amx_bf16": True}),
        ("with less than AVX-512", {"avx2": True}),
        ("that rounds", {"avx512_f": True}),
    ],
)
@pytest.mark.usefixtures("asked_anew", "narrow_matmuls")
def test_float32_on_a_processor_is_multiplied_in_full_precision(
    kind: str, capabilities: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    if kind == "that rounds":
        add_ = gram._add_widened
        rounding = lambda lower_DD, sum_D, x_ND: add_(lower_DD, sum_D, x_ND.bfloat16())  # noqa: E731
        monkeypatch.setattr(gram, "_add_widened", rounding)
    assert not gram._multiplies_float32_anyway()
    with Products() as products:
        moment()
    assert set(products.seen) == {("ieee", "ieee")}


def test_settings_come_back_after_an_error() -> None:
    before = settings()
    with pytest.raises(RuntimeError, match="stop"), full_precision():
        raise RuntimeError("stop")
    assert settings() == before
    assert torch.get_float32_matmul_precision() == "highest"
