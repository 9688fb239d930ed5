"""Properties of moments and subspaces on inputs made to break them, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgetless.linalg.generalised import generalised_basis
from forgetless.linalg.krylov import is_small
from forgetless.linalg.moments import SecondMoment
from forgetless.linalg.subspace import contrast_basis, null_basis, rounding_of, top_basis

EPS = torch.finfo(torch.float32).eps
# D = 1, and widths at and beside the edges of the blocks that a sum is made in.
WIDTHS = st.sampled_from([1, 2, 7, 191, 192, 193, 385])
COUNTS = st.sampled_from([0, 1, 3, 64, 300])
SCALES = st.sampled_from([1e-15, 1e-6, 1.0, 1e6, 1e13])  # squares of outliers: 1e35
FEW = settings(max_examples=25, deadline=None)


def tokens(count: int, width: int, seed: int, *, kind: str = "plain", scale: float = 1.0) -> Tensor:
    """Correlated activations about a mean, with what trained models add to them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    x = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + 0.3
    if kind == "outlier channel":
        x[:, seed % width] *= 1e4
    elif kind == "outlier token" and count:
        x[seed % count] *= 1e4
    elif kind == "copies":  # every channel is one of three
        x = x[:, torch.arange(width) % min(3, width)]
    elif kind == "silent channels":
        x[:, ::2] = 0
    return x * scale


KINDS = st.sampled_from(["plain", "outlier channel", "outlier token", "copies", "silent channels"])
SEEDS = st.integers(0, 2**20)


def moment_of(x: Tensor) -> SecondMoment:
    found = SecondMoment.zeros(x.shape[1], dtype=x.dtype)
    found.add_(x)
    return found


def mean_of(x: Tensor) -> np.ndarray:
    wide = x.double().numpy()
    return wide.T @ wide / max(len(wide), 1)


@FEW
@given(WIDTHS, COUNTS, KINDS, SCALES, SEEDS)
def test_a_float32_moment_is_that_of_float64(
    width: int, count: int, kind: str, scale: float, seed: int
) -> None:
    x = tokens(count, width, seed, kind=kind, scale=scale).float()
    found = moment_of(x)
    expected = mean_of(x)
    assert found.num_tokens == count
    mean = found.mean_DD()
    assert torch.equal(mean, mean.T)
    assert np.linalg.norm(mean.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)
    total = x.double().sum(0)
    assert (found.sum_D.double() - total).norm() <= 1e-5 * x.double().abs().sum(0).norm()


@FEW
@given(WIDTHS, COUNTS, KINDS, SEEDS, st.sampled_from([torch.bfloat16, torch.float16]))
def test_products_of_16_bits_are_summed_as_exactly_as_those_of_32(
    width: int, count: int, kind: str, seed: int, dtype: torch.dtype
) -> None:
    x = tokens(count, width, seed, kind=kind, scale=0.1).to(dtype)
    narrow, wide = moment_of(x).mean_DD().double().numpy(), mean_of(x)
    assert np.linalg.norm(narrow - wide) <= 1e-5 * np.linalg.norm(wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_summed_does_not_depend_on_chunks(dtype: torch.dtype) -> None:
    """More tokens than one chunk holds, on either side of its edge."""
    for count in (4096, 10922, 10923, 11000):
        x = tokens(count, 192, count, kind="outlier channel").to(dtype)
        found, expected = moment_of(x).mean_DD().double().numpy(), mean_of(x)
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@FEW
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), WIDTHS, KINDS, SEEDS, st.randoms())
def test_merging_in_any_order_is_adding_at_once(
    counts: list[int], width: int, kind: str, seed: int, draw
) -> None:
    parts = [tokens(n, width, seed + i, kind=kind).float() for i, n in enumerate(counts)]
    whole = moment_of(torch.cat(parts))
    draw.shuffle(parts)
    merged = SecondMoment.zeros(width)
    for part in parts:
        merged.merge_(moment_of(part))
    assert merged.num_tokens == whole.num_tokens == sum(counts)
    assert (merged.mean_DD() - whole.mean_DD()).norm() <= 1e-5 * whole.mean_DD().norm()


def spectrum(kind: str, width: int) -> np.ndarray:
    """Eigenvalues, ascending."""
    if kind == "all equal":
        return np.ones(width)
    if kind == "clusters":
        return np.sort(10.0 ** -(np.arange(width) % 4).astype(float))
    if kind == "rank-deficient":
        return np.concatenate([np.zeros(width - width // 3), np.linspace(1, 2, width // 3)])
    if kind == "one outlier":
        return np.concatenate([np.linspace(1e-4, 1e-3, width - 1), [1e4]])
    return np.logspace(-8, 0, width)


def moment_with(values: np.ndarray, seed: int, scale: float) -> Tensor:
    generator = np.random.default_rng(seed)
    axes = np.linalg.qr(generator.standard_normal((len(values), len(values))))[0]
    moment = torch.from_numpy((axes * values) @ axes.T * scale).float()
    return (moment + moment.T) / 2


SPECTRA = st.sampled_from(["all equal", "clusters", "rank-deficient", "one outlier", "powers"])
# (R, D): the whole spectrum, and a part of it.
SIZES = st.sampled_from([(1, 1), (1, 40), (3, 3), (4, 40), (4, 96), (16, 240)])


@settings(max_examples=40, deadline=None)
@given(SIZES, SPECTRA, st.sampled_from([1e-20, 1.0, 1e20]), SEEDS, st.booleans())
def test_the_energy_of_a_basis_is_within_a_percent_of_the_best(
    size: tuple[int, int], kind: str, scale: float, seed: int, null: bool
) -> None:
    rank, width = size
    moment = moment_with(spectrum(kind, width), seed, scale)
    basis, energies = (null_basis if null else top_basis)(moment, rank)
    again = (null_basis if null else top_basis)(moment, rank)
    assert torch.equal(basis, again[0])  # no chance in it
    wide, vectors = moment.double().numpy(), basis.double().numpy()
    assert np.abs(vectors.T @ vectors - np.eye(rank)).max() < 1e-5
    values = np.linalg.eigvalsh(wide)
    best = values[:rank].sum() if null else values[-rank:].sum()
    noise = rank * width * EPS * values[-1]  # what rounding the vectors to float32 may add
    held = np.trace(vectors.T @ wide @ vectors)
    assert abs(held - best) <= 0.01 * abs(best) + noise
    assert abs(float(energies.double().sum()) - held) <= 0.01 * abs(held) + noise


@pytest.mark.parametrize("rank", [8, 32])
def test_a_moment_of_zeros_has_orthonormal_directions(rank: int) -> None:
    vectors = top_basis(torch.zeros(384, 384), rank)[0].double()
    assert (vectors.T @ vectors - torch.eye(rank)).abs().max() < 1e-6


@pytest.mark.parametrize("null", [True, False])
def test_more_equal_eigenvalues_than_directions_are_asked_for(null: bool) -> None:
    """A block narrower than the cluster finds no more of it than it is wide."""
    width, rank = 768, 32
    values = np.logspace(-3, 0, width)
    values[:60], values[-35:] = values[0], values[-1]
    moment = moment_with(values, 3, 1.0)
    basis = (null_basis if null else top_basis)(moment, rank)[0].double().numpy()
    best = values[:rank].sum() if null else values[-rank:].sum()
    assert np.trace(basis.T @ moment.double().numpy() @ basis) == pytest.approx(best, rel=0.01)


@settings(max_examples=20, deadline=None)
@given(st.floats(-9, -3), st.sampled_from([(8, 384), (16, 240)]), SEEDS)
def test_weak_directions_are_told_apart_beside_the_rounding_of_a_factor(
    power: float, size: tuple[int, int], seed: int
) -> None:
    """The weakest hold as little as a float32 factor can tell, less, or more."""
    rank, width = size
    weak = 10.0**power * np.linspace(1, 20, 4 * rank)
    moment = moment_with(np.concatenate([weak, np.linspace(0.01, 1, width - len(weak))]), seed, 1.0)
    wide, basis = moment.double().numpy(), null_basis(moment, rank)[0].double().numpy()
    best = np.linalg.eigvalsh(wide)[:rank].sum()
    assert np.trace(basis.T @ wide @ basis) <= best + 0.01 * abs(best) + EPS**2 * width


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_rounding_of_a_moment_is_its_norm_in_units_of_the_last_place(scale: float) -> None:
    moment = moment_with(np.logspace(-3, 0, 13), 3, scale)
    assert rounding_of(moment) == pytest.approx(EPS * np.linalg.norm(moment.double()), rel=1e-4)


def test_both_ways_to_solve_are_tested() -> None:
    assert [is_small(rank, width) for rank, width in [(1, 1), (1, 40), (3, 3), (4, 40)]] == [
        False,
        True,
        False,
        False,
    ]
    assert is_small(4, 96)
    assert is_small(16, 240)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(4, 96), (4, 20)]), SEEDS, st.sampled_from([1e-10, 1.0, 1e10]))
def test_a_planted_null_space_is_found(size: tuple[int, int], seed: int, scale: float) -> None:
    rank, width = size
    values = np.concatenate([np.full(rank, 1e-4), np.linspace(1, 2, width - rank)])
    moment = moment_with(values, seed, scale)
    found = null_basis(moment, rank)[0].double().numpy()
    axes = np.linalg.eigh(moment.double().numpy())[1][:, :rank]
    assert np.abs(found @ found.T - axes @ axes.T).max() < 1e-3


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(3, 10, 12), (3, 60, 20), (20, 24, 30), (1, 1, 1)]), SEEDS, SCALES)
def test_the_reward_of_a_contrast_basis_is_the_best(
    size: tuple[int, int, int], seed: int, scale: float
) -> None:
    rank, out, width = size
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    plus, minus = (mean_of(tokens(200, width, seed + i, kind="outlier channel")) for i in (0, 1))
    contrast = plus / np.trace(plus) - minus / np.trace(minus)
    found = contrast_basis(weight, torch.from_numpy(contrast * scale).float(), rank)
    stored = torch.from_numpy(contrast * scale).float().double().numpy()
    outer = weight.double().numpy() @ stored @ weight.double().numpy().T
    best = np.linalg.eigvalsh(outer)[::-1][:rank].sum()
    basis = found.basis_OR.double().numpy()
    slack = 1e-4 * np.abs(np.linalg.eigvalsh(outer)).max()
    assert abs(np.trace(basis.T @ outer @ basis) - best) <= slack
    assert np.abs(basis.T @ basis - np.eye(rank)).max() < 1e-5


@pytest.mark.slow
def test_a_wide_contrast_is_solved_in_part_and_holds_the_best_reward() -> None:
    width, rank = 1056, 8
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.standard_normal((width, width)))[0]
    values = np.concatenate([np.logspace(0, -4, 40), -np.logspace(-4, 0, width - 40)])
    contrast = torch.from_numpy((axes * values) @ axes.T).float()
    found = contrast_basis(torch.eye(width), (contrast + contrast.T) / 2, rank)
    held = float(found.eigenvalues_R.sum())
    assert held == pytest.approx(values[:rank].sum(), rel=0.01)
    assert (found.num_positive, found.num_negative) == (rank, 0)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([(2, 6), (4, 96)]), SEEDS, KINDS)
def test_generalised_directions_are_those_of_whitened_moments(
    size: tuple[int, int], seed: int, kind: str
) -> None:
    rank, width = size
    plus, minus = (mean_of(tokens(300, width, seed + i, kind=kind)) for i in (0, 1))
    ridge = 1e-3 * np.trace(minus) / width
    found, gamma = generalised_basis(
        torch.from_numpy(plus), torch.from_numpy(minus), rank, ridge=ridge
    )
    inverse = np.linalg.inv(np.linalg.cholesky(minus + ridge * np.eye(width)))
    expected = np.linalg.eigvalsh(inverse @ plus @ inverse.T)[::-1][:rank]
    assert np.log1p(gamma.numpy()).sum() == pytest.approx(np.log1p(expected).sum(), rel=0.01)
    basis = found.numpy()
    assert np.abs(basis.T @ basis - np.eye(rank)).max() < 1e-10
