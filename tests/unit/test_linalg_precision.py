"""Solves and sums never run in TF32 or bf16, also where the process allows both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def start(name: str) -> None:
    method = make_method({"name": name, "rank": 2})
    layer = LayerWeights("layer", torch.ones(8, 6).tril(), None)
    method.init(layer, SiteStatistics(moment(), moment()), torch.Generator())


@pytest.mark.parametrize(
    "solve",
    [
        moment,
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


def test_settings_come_back_after_an_error() -> None:
    before = settings()
    with pytest.raises(RuntimeError, match="stop"), full_precision():
        raise RuntimeError("stop")
    assert settings() == before
    assert torch.get_float32_matmul_precision() == "highest"
