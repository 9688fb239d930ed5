"""Subspaces and factors against planted answers and full-size eigendecompositions in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forgetless.linalg.lowrank import concatenated_delta, project_and_balance, row_space
from forgetless.linalg.subspace import contrast_basis, leakage, null_basis
from forgetless.linalg.thin_qr import thin_qr


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(basis: torch.Tensor) -> torch.Tensor:
    return basis @ basis.T


def test_null_basis_recovers_planted_directions() -> None:
    q = torch.linalg.qr(random(12, 12)).Q
    energies = torch.tensor([1e-6] * 3 + [10.0**k for k in range(9)], dtype=torch.float64)
    moment = q @ torch.diag(energies) @ q.T
    found, energies = null_basis(moment, 3)
    torch.testing.assert_close(projector(found), projector(q[:, :3]), rtol=0, atol=1e-6)
    torch.testing.assert_close(energies, energies.new_full((3,), 1e-6), rtol=1e-2, atol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("rank", [0, 5])
def test_null_basis_refuses_a_rank_outside_the_width(rank: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.4"):
        null_basis(torch.eye(4), rank)


@pytest.mark.parametrize(("out", "width"), [(6, 10), (10, 10), (14, 6)])
def test_contrast_basis_spans_the_literal_top_directions(out: int, width: int) -> None:
    weight = random(out, width)
    contrast = random(width, width, seed=1)
    contrast = contrast + contrast.T
    rank = 3
    found = contrast_basis(weight, contrast, rank)
    values, vectors = np.linalg.eigh((weight @ contrast @ weight.T).numpy())
    literal = torch.from_numpy(vectors[:, ::-1][:, :rank].copy())
    np.testing.assert_allclose(found.eigenvalues_R.numpy(), values[::-1][:rank], atol=1e-8)
    torch.testing.assert_close(projector(found.basis_OR), projector(literal), rtol=0, atol=1e-8)


def test_contrast_basis_prefers_unreachable_directions_to_negative_ones() -> None:
    weight = random(9, 4)
    found = contrast_basis(weight, -torch.eye(4, dtype=torch.float64), 6)
    values = np.linalg.eigvalsh((-weight @ weight.T).numpy())[::-1][:6]
    np.testing.assert_allclose(found.eigenvalues_R.numpy(), values, atol=1e-8)
    assert (found.num_positive, found.num_negative) == (0, 1)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found.basis_OR.T @ found.basis_OR, eye)
    again = contrast_basis(weight, -torch.eye(4, dtype=torch.float64), 6)
    assert torch.equal(found.basis_OR, again.basis_OR)


@pytest.mark.parametrize("out", [96, 128])
def test_contrast_basis_tells_weak_rewards_from_zero_in_float32(out: int) -> None:
    """Rewards down to 2e-6 of the largest; a float32 solve calls those below 1e-5 zero."""
    width = 96
    q = torch.linalg.qr(random(width, width)).Q
    rewards = torch.logspace(0, -5.7, width, dtype=torch.float64)
    signs = torch.where(torch.arange(width) % 2 == 0, 1.0, -1.0).double()
    contrast = (q * (rewards * signs)) @ q.T
    weight = torch.linalg.qr(random(out, width, seed=1)).Q if out > width else torch.eye(width)
    found = contrast_basis(weight.float(), contrast.float(), width)
    assert found.basis_OR.dtype == found.eigenvalues_R.dtype == torch.float32
    assert found.num_positive == width // 2
    assert found.num_negative == (width // 2 if out == width else width // 2 - (out - width))


def test_directions_that_are_zero_but_for_float32_rounding_count_as_zero() -> None:
    factor = random(64, 20).float()
    found = contrast_basis(torch.eye(64), factor @ factor.T, 64)
    assert (found.num_positive, found.num_negative) == (20, 0)


def test_a_difference_of_equal_moments_has_no_direction_but_rounding() -> None:
    """The same tokens summed in two orders: S is rounding, small beside what it was made from."""
    x = random(4000, 64).float() * torch.logspace(-2, 2, 64)
    forth, back = x.T @ x, x.flip(0).T @ x.flip(0)
    assert not torch.equal(forth, back)
    trace = float(forth.trace() + back.trace()) / 2
    found = contrast_basis(torch.eye(64), (forth - back) / 2, 16, scale=trace)
    assert (found.num_positive, found.num_negative) == (0, 0)


@pytest.mark.parametrize(("out", "width", "rank"), [(8, 5, 2), (5, 8, 5), (6, 6, 1)])
def test_balanced_factors_equal_the_papers_full_svd(out: int, width: int, rank: int) -> None:
    weight, basis = random(out, width), torch.linalg.qr(random(width, rank, seed=2)).Q
    a, b = project_and_balance(weight, basis)
    target = weight @ basis @ basis.T
    torch.testing.assert_close(b @ a, target, rtol=0, atol=1e-12)
    left, sigma, right = np.linalg.svd(target.numpy())
    np.testing.assert_allclose((b.T @ b).numpy(), np.diag(sigma[:rank]), atol=1e-10)
    np.testing.assert_allclose((a @ a.T).numpy(), np.diag(sigma[:rank]), atol=1e-10)
    for k in range(rank):  # singular vectors up to sign
        assert abs(left[:, k] @ b[:, k].numpy()) == pytest.approx(np.sqrt(sigma[k]))
        assert abs(right[k] @ a[k].numpy()) == pytest.approx(np.sqrt(sigma[k]))


def test_concatenated_delta_is_the_difference_of_products() -> None:
    a, b, a0, b0 = random(2, 5), random(4, 2, seed=1), random(2, 5, seed=2), random(4, 2, seed=3)
    left, right = concatenated_delta(a, b, a0, b0)
    torch.testing.assert_close(right @ left, (b0 + b) @ (a0 + a) - b0 @ a0)


def test_row_space_drops_what_has_no_rank() -> None:
    a = random(3, 6)
    a[2] = a[0] + a[1]
    assert row_space(a).shape == (6, 2)
    assert row_space(torch.zeros(3, 6)).shape == (6, 0)


def test_leakage_is_one_for_isotropic_energy_and_zero_in_the_null_space() -> None:
    basis = torch.eye(6, dtype=torch.float64)[:, :2]
    assert leakage(basis, torch.eye(6, dtype=torch.float64)) == pytest.approx(1.0)
    moment = torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert leakage(basis, moment) == 0.0
    assert leakage(torch.zeros(6, 0), torch.eye(6)) == 0.0


@pytest.mark.parametrize("weakest", [1.0, 1e-3, 1e-9, 0.0])
def test_thin_qr_whatever_the_condition(weakest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    tall[:, -1] = tall[:, 0] + weakest * tall[:, -1]
    q, r = thin_qr(tall)
    assert (q.T @ q - torch.eye(12)).abs().max() < 1e-7
    assert (q @ r - tall).abs().max() < 1e-12 * 60
    assert torch.equal(r, r.triu())
