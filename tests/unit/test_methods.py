"""Methods against their papers' equations, written out at full size in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from forgetless.errors import MethodError
from forgetless.linalg.moments import SecondMoment
from forgetless.methods import METHODS, make_method, method_options
from forgetless.methods.base import LayerWeights, SiteStatistics
from forgetless.methods.lora import LoRA


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(x: torch.Tensor, samples: int = 1) -> SecondMoment:
    moment = SecondMoment.zeros(x.shape[1], dtype=torch.float64)
    moment.add_(x, num_samples=samples)
    return moment


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_lora_null_equals_the_papers_algorithm() -> None:
    weight, x = random(9, 7), random(40, 7, seed=1) * torch.logspace(0, 3, 7, dtype=torch.float64)
    method = make_method({"name": "lora-null", "rank": 3})
    init = method.init(
        LayerWeights("l", weight), SiteStatistics(preserve=moment_of(x)), generator()
    )
    # Sec. 3: U_null = left singular vectors of X (d_in x tokens) of least singular value.
    u_null = np.linalg.svd(x.T.numpy())[0][:, -3:]
    expected = weight.numpy() @ u_null @ u_null.T
    np.testing.assert_allclose((init.b_OR @ init.a_RD).numpy(), expected, atol=1e-9)
    assert init.diagnostics["leakage_calibration"] < 1e-2


def test_lora_null_basis_start_is_the_transposed_null_basis() -> None:
    x = random(40, 6) * torch.logspace(0, 3, 6, dtype=torch.float64)
    method = make_method({"name": "lora-null", "rank": 2, "start": "basis"})
    init = method.init(
        LayerWeights("l", random(4, 6)), SiteStatistics(preserve=moment_of(x)), generator()
    )
    u_null = np.linalg.svd(x.T.numpy())[0][:, -2:]
    np.testing.assert_allclose((init.a_RD.T @ init.a_RD).numpy(), u_null @ u_null.T, atol=1e-9)
    assert not init.b_OR.any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalisation", ["trace", "tokens", "samples"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8])
def test_sc_lora_equals_algorithm_1_on_outputs(beta: float, normalisation: str, bias: bool) -> None:
    weight, shift = random(6, 8), random(6, seed=9)
    train, preserve = random(50, 8, seed=1), 3 * random(30, 8, seed=2)
    covariances = []
    for x, samples in ((train, 5), (preserve, 10)):
        h = x @ weight.T + (shift if bias else 0)
        total = (h.T @ h).numpy()
        covariances.append(
            {
                "tokens": total / len(x),
                "samples": total / samples,
                "trace": total / np.trace(total),
            }[normalisation]
        )
    delta = (1 - beta) * covariances[0] - beta * covariances[1]
    q = np.linalg.eigh(delta)[1][:, ::-1][:, :2]
    method = make_method(
        {"name": "sc-lora", "rank": 2, "beta": beta, "normalisation": normalisation}
    )
    stats = SiteStatistics(
        train=moment_of(train, 5), preserve=moment_of(preserve, 10) if beta > 0 else None
    )
    init = method.init(LayerWeights("l", weight, shift if bias else None), stats, generator())
    np.testing.assert_allclose((init.b_OR @ init.b_OR.T).numpy(), q @ q.T, atol=1e-8)
    np.testing.assert_allclose((init.b_OR @ init.a_RD).numpy(), q @ q.T @ weight.numpy(), atol=1e-8)


def test_sc_lora_counts_and_drops_directions_of_negative_reward() -> None:
    weight, x = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    stats = SiteStatistics(train=moment_of(x[:1]), preserve=moment_of(x))
    method = make_method({"name": "sc-lora", "rank": 3, "beta": 0.5, "negative": "drop"})
    init = method.init(LayerWeights("l", weight), stats, generator())
    assert init.diagnostics == {
        "positive_directions": 1,
        "zero_directions": 0,
        "negative_directions": 2,
    }
    assert torch.linalg.matrix_rank(init.b_OR @ init.a_RD) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_lacks(name: str) -> None:
    method = make_method(name, rank=2)
    for role in method.needs:
        kept = {other: moment_of(random(9, 5)) for other in method.needs - {role}}
        layer, stats = LayerWeights("l", random(6, 5)), SiteStatistics(**kept)
        with pytest.raises(MethodError, match=f"moment of {role} data"):
            method.init(layer, stats, generator())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lora-nul", "did you mean lora-null"),
        ({"name": "sc-lora", "betta": 1}, "did you mean beta"),
        ({"name": "sc-lora", "beta": 1.5}, r"in 0\.\.1 or auto, got 1\.5"),
        ({"name": "sc-lora", "beta": "much"}, "expected a number or auto, got 'much'"),
        ({"name": "sc-lora", "trains": "b"}, "expected both or a"),
        ({"name": "lora-null", "trains": "a"}, "expected b or both"),
        ({"name": "lora-null", "start": "basis", "trains": "both"}, "use trains: b"),
        ({"name": "lora", "rank": 0}, "at least 1, got 0"),
        ({"name": "lora", "rank": 2.5}, "expected a whole number, got 2.5"),
        ({"name": "lora", "alpha": -1}, "finite number above 0, got -1"),
        ({"name": "lora", "alpha": float("inf")}, "alpha: expected a finite number, got inf"),
        ({"name": "lora", "alpha": float("nan")}, "alpha: expected a finite number, got nan"),
        ({"name": "sc-lora", "beta": float("nan")}, "beta: expected a finite number, got nan"),
        ({"rank": 4}, "expected one of"),
    ],
)
def test_a_wrong_option_is_one_clear_line(given: object, message: str) -> None:
    with pytest.raises(MethodError, match=message) as caught:
        make_method(given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_rank_shorthand_must_not_contradict() -> None:
    assert make_method("lora", rank=4).rank == 4
    with pytest.raises(MethodError, match="given twice"):
        make_method({"name": "lora", "rank": 8}, rank=4)
    with pytest.raises(MethodError, match="expected 8"):
        make_method(make_method("lora", rank=8), rank=4)


@pytest.mark.parametrize("rank", ["8", 8.5, True])
def test_rank_shorthand_is_checked_like_the_option(rank: Any) -> None:
    with pytest.raises(
        MethodError, match=f"method lora: rank: expected a whole number, got {rank!r}"
    ):
        make_method("lora", rank=rank)
    with pytest.raises(MethodError, match="alpha: expected a finite number above 0, got inf"):
        LoRA(alpha=float("inf"))


def test_options_round_trip() -> None:
    method = make_method({"name": "sc-lora", "beta": 0.25, "rank": 4})
    assert make_method(method_options(method)) == method


def test_beta_at_its_ends_needs_one_kind_of_data_only() -> None:
    assert make_method({"name": "sc-lora", "beta": 0}).needs == {"train"}
    assert make_method({"name": "sc-lora", "beta": 1}).needs == {"preserve"}


def test_rank_above_a_layers_width_names_the_layer() -> None:
    with pytest.raises(MethodError, match=r"at most 4, the smaller width of layer m\.q \(8 x 4\)"):
        make_method("lora", rank=5).check_layer("m.q", 4, 8)
