"""Second moments against naive float64 loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetless.errors import CalibrationError
from forgetless.linalg.moments import SecondMoment, augment_bias, output_energy


def tokens_with_outliers(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Activations as transformers have them: correlated, with a few channels 1e3 times larger."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix
    x[:, 0] *= 1e3
    return x + 0.5


def test_moment_is_the_uncentred_mean_of_outer_products() -> None:
    x = tokens_with_outliers(50, 6)
    moment = SecondMoment.zeros(6, dtype=torch.float64)
    moment.add_(x)
    expected = sum(torch.outer(row, row) for row in x) / 50
    torch.testing.assert_close(moment.mean_DD(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(moment.mean_D(), sum(x) / 50, rtol=1e-12, atol=1e-12)
    assert moment.num_tokens == 50


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 99))
def test_moment_ignores_how_tokens_are_batched(cuts: list[int], seed: int) -> None:
    x = tokens_with_outliers(40, 5, seed).float()
    whole = SecondMoment.zeros(5)
    whole.add_(x)
    parts = SecondMoment.zeros(5)
    edges = [0, *sorted(cuts), 40]
    for start, stop in pairwise(edges):
        piece = SecondMoment.zeros(5)
        piece.add_(x[start:stop])
        parts.merge_(piece)
    assert parts.num_tokens == 40
    error = (parts.mean_DD() - whole.mean_DD()).norm() / whole.mean_DD().norm()
    assert error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_never_rounded_below_float32(dtype: torch.dtype) -> None:
    x = (tokens_with_outliers(4096, 8) / 1e3).to(dtype)
    moment = SecondMoment.zeros(8, dtype=dtype)
    moment.add_(x)
    assert moment.lower_DD.dtype == torch.float32
    exact = x.double().T @ x.double()
    assert (moment.mean_DD().double() * 4096 - exact).norm() / exact.norm() < 1e-5


def test_wrong_width_names_both_shapes() -> None:
    with pytest.raises(CalibrationError, match=r"\(T, 4\), got \(3, 5\)"):
        SecondMoment.zeros(4).add_(torch.ones(3, 5))
    with pytest.raises(CalibrationError, match="width 4 to merge, got 5"):
        SecondMoment.zeros(4).merge_(SecondMoment.zeros(5))


@pytest.mark.parametrize("bias", [False, True])
def test_derived_output_moment_equals_the_hooked_one(bias: bool) -> None:
    x = tokens_with_outliers(64, 7)
    layer = torch.nn.Linear(7, 11, bias=bias).double()
    with torch.no_grad():
        h = layer(x)
    hooked = sum(torch.outer(row, row) for row in h) / 64
    moment = SecondMoment.zeros(7, dtype=torch.float64)
    moment.add_(x)
    weight, inputs = augment_bias(
        layer.weight.detach(),
        layer.bias.detach() if bias else None,
        moment.mean_DD(),
        moment.mean_D(),
    )
    torch.testing.assert_close(weight @ inputs @ weight.T, hooked, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(output_energy(weight, inputs), hooked.trace(), rtol=1e-10, atol=0)
