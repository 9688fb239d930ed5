"""The weighted truncation against a full SVD through the root of the moment, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forgetless.linalg import lowrank
from forgetless.linalg.lowrank import truncate

# Shapes: D = 24 inputs, O = 16 or 40 outputs, K = rank before.
D = 24


def moment(rank: int, seed: int = 1) -> Tensor:
    """Σ x xᵀ over tokens with outliers, of the given rank, with directions far apart in scale."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(200, rank, generator=generator, dtype=torch.float64)
    x_TD = x_TD * torch.logspace(0, -3, rank, dtype=torch.float64)
    x_TD = x_TD @ torch.randn(rank, D, generator=generator, dtype=torch.float64)
    x_TD[:3] *= 50
    return x_TD.T @ x_TD / 200


def update(out: int, rank: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """A (K, D) and B (O, K) with rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    a_KD = torch.randn(rank, D, generator=generator, dtype=torch.float64)
    b_OK = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return a_KD * torch.logspace(0, -2, rank, dtype=torch.float64)[:, None], b_OK


def root(moment_DD: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment_DD)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def loss(delta_OD: Tensor, other_OD: Tensor, moment_DD: Tensor) -> float:
    gap = delta_OD - other_OD
    return float(torch.trace(gap @ moment_DD @ gap.T))


def least_loss(delta_OD: Tensor, rank: int, moment_DD: Tensor) -> float:
    """Eckart and Young: what no matrix of that rank can undercut."""
    sigma = torch.linalg.svdvals(delta_OD @ root(moment_DD))
    return float(sigma[rank:].square().sum())


@pytest.mark.parametrize("out", [16, 40])
@pytest.mark.parametrize("rank_before", [6, 20])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("moment_rank", [D, 10, 2])
def test_no_update_of_that_rank_loses_less(
    out: int, rank_before: int, rank: int, moment_rank: int
) -> None:
    a_KD, b_OK = update(out, rank_before)
    moment_DD = moment(moment_rank)
    cut = truncate(a_KD, b_OK, rank, moment_DD)
    delta_OD, cut_OD = b_OK @ a_KD, cut.b_OR @ cut.a_RD
    assert cut.a_RD.shape == (rank, D)
    assert cut.b_OR.shape == (out, rank)
    energy = loss(delta_OD, torch.zeros_like(delta_OD), moment_DD)
    found = loss(delta_OD, cut_OD, moment_DD)
    assert found == pytest.approx(least_loss(delta_OD, rank, moment_DD), abs=1e-12 * energy)
    assert cut.lost == pytest.approx(found, abs=1e-12 * energy)
    assert cut.energy == pytest.approx(energy)
    kept = loss(cut_OD, torch.zeros_like(cut_OD), moment_DD)
    assert cut.energy - cut.lost == pytest.approx(kept, rel=1e-9)


def test_the_metric_matters() -> None:
    a_KD, b_OK = update(16, 8)
    moment_DD = moment(D)
    blind = truncate(a_KD, b_OK, 2)
    seeing = truncate(a_KD, b_OK, 2, moment_DD)
    delta_OD = b_OK @ a_KD
    in_moment = [loss(delta_OD, cut.b_OR @ cut.a_RD, moment_DD) for cut in (seeing, blind)]
    in_identity = [
        loss(delta_OD, cut.b_OR @ cut.a_RD, torch.eye(D).double()) for cut in (blind, seeing)
    ]
    assert in_moment[0] < 0.9 * in_moment[1]
    assert in_identity[0] < 0.9 * in_identity[1]


def test_without_a_moment_it_is_the_truncated_svd() -> None:
    a_KD, b_OK = update(16, 8)
    u, sigma, v = torch.linalg.svd(b_OK @ a_KD)
    expected = u[:, :3] * sigma[:3] @ v[:3]
    cut = truncate(a_KD, b_OK, 3)
    torch.testing.assert_close(cut.b_OR @ cut.a_RD, expected)
    torch.testing.assert_close(cut.a_RD @ cut.a_RD.T, torch.diag(sigma[:3]))
    torch.testing.assert_close(cut.b_OR.T @ cut.b_OR, torch.diag(sigma[:3]))


def test_ranks_that_the_moment_does_not_need_go_to_what_is_left_of_the_update() -> None:
    a_KD, b_OK = update(16, 8)
    moment_DD = moment(2)  # two directions say all that M sees
    cut = truncate(a_KD, b_OK, 5, moment_DD)
    delta_OD, cut_OD = b_OK @ a_KD, cut.b_OR @ cut.a_RD
    seen = torch.linalg.svd(delta_OD @ root(moment_DD)).U[:, :2]
    rest = delta_OD - seen @ (seen.T @ delta_OD)
    assert loss(delta_OD, cut_OD, moment_DD) == pytest.approx(0, abs=1e-9 * cut.energy)
    expected = float(torch.linalg.svdvals(rest)[3:].square().sum())
    assert loss(delta_OD, cut_OD, torch.eye(D).double()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("moment_DD", [None, torch.zeros(D, D, dtype=torch.float64)])
def test_an_update_of_nothing_stays_nothing(moment_DD: Tensor | None) -> None:
    cut = truncate(torch.zeros(8, D), torch.zeros(16, 8), 3, moment_DD)
    assert torch.equal(cut.b_OR @ cut.a_RD, torch.zeros(16, D))
    assert (cut.energy, cut.lost) == (0.0, 0.0)
    assert cut.a_RD.dtype == torch.float32


def test_a_rank_that_suffices_changes_nothing() -> None:
    a_KD, b_OK = update(16, 4)
    cut = truncate(a_KD, b_OK, 4, moment(D))
    assert cut.a_RD is a_KD
    assert cut.b_OR is b_OK
    assert cut.lost == 0.0


def test_float32_factors_and_a_float32_moment_are_enough() -> None:
    a_KD, b_OK = update(40, 12)
    moment_DD = moment(D)
    cut = truncate(a_KD.float(), b_OK.float(), 4, moment_DD.float())
    delta_OD = b_OK @ a_KD
    found = loss(delta_OD, (cut.b_OR @ cut.a_RD).double(), moment_DD)
    assert found == pytest.approx(least_loss(delta_OD, 4, moment_DD), rel=1e-4)


def test_a_moment_is_widened_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    a_KD, b_OK = update(16, 8)
    whole = truncate(a_KD, b_OK, 3, moment(D))
    monkeypatch.setattr(lowrank, "_BLOCK", 5)
    blocks = truncate(a_KD, b_OK, 3, moment(D))
    torch.testing.assert_close(blocks.b_OR @ blocks.a_RD, whole.b_OR @ whole.a_RD)
    assert blocks.energy == pytest.approx(whole.energy)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more, got 0"):
        truncate(*update(16, 4), 0)
