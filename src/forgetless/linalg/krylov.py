"""The few leading eigenvectors of a symmetric operator, without its whole spectrum.

Block Krylov: the space of X, F X, F² X, … for a random block X, grown a block at a time with full
reorthogonalisation. It stops on what the R leading Ritz values hold together, the energy that the
methods are about, and not on vectors: of a cluster any basis is as good as another.

A block is as wide as R. Of equal eigenvalues a block of K finds K, and the rest only through
rounding, after the figure has long stood still.
"""

# Shape letters: D = width of the operator, K = width of a block, M = directions so far, R = rank.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Partial solves pay from this many times the rank on; below, the whole spectrum is as fast.
SMALL_RANK = 12
TOLERANCE = 1e-2  # change of the captured energy from one look to the next, relative
LOOKS = 2  # blocks from one look to the next: looking takes an eigendecomposition
LARGEST = 14  # directions, in ranks, after which the whole spectrum is the better way
LARGEST_OF_FEW = 128  # the same of a rank so small that this is more


def is_small(rank: int, width: int) -> bool:
    """Whether R of D directions are few enough for a partial solve."""
    return rank * SMALL_RANK <= width


def krylov_basis(
    apply: Callable[[Tensor], Tensor],
    like_DD: Tensor,
    rank: int,
    captured: Callable[[Tensor], Tensor] = torch.sum,
    *,
    small: float = 0.0,
) -> Tensor | None:
    """Orthonormal Ritz vectors (D, 2R), by descending Ritz value: nearly the R leading ones.

    The start is random, and always the same.

    Args:
        apply: F X for a block X (D, K); F symmetric, its leading eigenvalues the largest.
        like_DD: Tensor of the operator's width, and of the device and dtype to work in.
        rank: R.
        captured: Of the R leading Ritz values, descending: the figure whose relative change stops
            the growth, such as their sum.
        small: A figure below this is as good as this.

    Returns:
        None where the figure goes on changing, or the device's routine fails over a projected
        problem: solve for the whole spectrum then.
    """
    D, block = like_DD.shape[0], max(rank, 8)
    limit = min(max(LARGEST * rank, LARGEST_OF_FEW), D) // block * block
    space_DM, ritz_MM = like_DD.new_empty(D, limit), like_DD.new_zeros(limit, limit)
    next_DK, before = _random(D, block, like_DD), None
    for start in range(0, limit, block):
        stop = start + block
        space_DM[:, start:stop] = orthonormal_outside(next_DK, space_DM[:, :start])
        next_DK = apply(space_DM[:, start:stop])
        ritz_MM[:stop, start:stop] = space_DM[:, :stop].T @ next_DK
        ritz_MM[start:stop, :stop] = ritz_MM[:stop, start:stop].T.clone()
        if stop < 3 * rank or (start // block) % LOOKS == 0:
            continue
        inner_MM = _for_eigenvalues(ritz_MM[:stop, :stop])
        try:
            now = float(captured(torch.linalg.eigvalsh(inner_MM).flip(0)[:rank]))
            if before is None or abs(now - before) > TOLERANCE * max(abs(now), small):
                before = now
                continue
            vectors_MM = torch.linalg.eigh(inner_MM).eigenvectors
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in its stubs
            return None
        leading_MR = vectors_MM.flip(1)[:, : 2 * rank].to(space_DM)
        ritz_DM: Tensor = space_DM[:, :stop] @ leading_MR
        return ritz_DM
    return None


def _for_eigenvalues(matrix_MM: Tensor) -> Tensor:
    """In float64 on CUDA, where the routine for float32 is no faster and may not converge."""
    return matrix_MM.double() if matrix_MM.is_cuda else matrix_MM


def orthonormal_outside(block_DK: Tensor, space_DM: Tensor) -> Tensor:
    """A block's directions that a space does not hold, as many as it has columns.

    Args:
        block_DK: Columns of any length.
        space_DM: Orthonormal columns, of the same dtype.

    Returns:
        Orthonormal columns (D, K), orthogonal to the space: random ones in place of those that lie
        inside of it, to rounding.
    """
    block_DK, _ = _outside(block_DK, space_DM)
    block_DK, left_K = _outside(block_DK, space_DM)
    lost_K = left_K < 0.5  # of unit length: what is left of these is rounding
    if bool(lost_K.any()):
        random_DK = _random(len(block_DK), block_DK.shape[1], block_DK)
        block_DK = torch.where(lost_K, random_DK, block_DK)
        for _ in range(2):
            block_DK, _ = _outside(block_DK, space_DM)
    return block_DK


def _outside(block_DK: Tensor, space_DM: Tensor) -> tuple[Tensor, Tensor]:
    """What a block adds to the space, as orthonormal columns, and how much each one adds."""
    block_DK, upper_KK = torch.linalg.qr(block_DK - space_DM @ (space_DM.T @ block_DK))
    return block_DK, upper_KK.diagonal().abs()


def _random(width: int, count: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, count, generator=generator, dtype=torch.float64).to(like)
