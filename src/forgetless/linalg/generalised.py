"""Two moments against each other: C₊ v = γ C₋ v."""

# Shape letters: O = layer output width, D = layer input width, R = rank, K = min(D, O).

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.linalg.krylov import is_small, krylov_basis
from forgetless.linalg.precision import full_precision, solving_dtype
from forgetless.linalg.subspace import check_rank
from forgetless.linalg.thin_qr import thin_qr


def generalised_basis(
    plus_DD: Tensor, minus_DD: Tensor, rank: int, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the R leading generalised eigenvectors of C₊ v = γ (C₋ + ridge I) v.

    Solved in float64 where `solving_dtype` says so, through a Cholesky factor, and where R is small
    beside D for the R leading ones only; where rounding has
    made C₋ + ridge I indefinite, through the spectrum of C₋, negative eigenvalues counting as 0.

    Args:
        plus_DD: C₊, symmetric, positive semidefinite, activation².
        minus_DD: C₋, the same.
        rank: R, 1 <= R <= D.
        ridge: Above 0, activation².

    Returns:
        basis_DR, whose first columns span the first eigenvectors, and gamma_R, descending; in the
        dtype of `plus_DD`.

    Raises:
        ValueError: rank outside 1..D, or a ridge that is not above 0.
    """
    check_rank(rank, plus_DD.shape[0])
    if not ridge > 0:
        raise ValueError(f"generalised basis: expected a ridge above 0, got {ridge}; raise it")
    wide = solving_dtype(plus_DD)
    with full_precision():
        gamma, vectors = _solve(plus_DD.to(wide), minus_DD.to(wide), ridge, rank)
        basis_DR = torch.linalg.qr(vectors[:, :rank]).Q
    return basis_DR.to(plus_DD).contiguous(), gamma[:rank].to(plus_DD)


def largest_beta(weight_OD: Tensor, plus_DD: Tensor, minus_DD: Tensor, rank: int) -> float:
    """The largest β at which R directions of the output still earn a reward that is not negative.

    (1 - β) C₊ - β C₋, with C± = W S± Wᵀ, has as many positive eigenvalues as there are γ above
    β / (1 - β) in C₊ v = γ C₋ v (Sylvester), so β* = γ_R / (1 + γ_R). Directions without energy on
    either side are outside of the problem: where they are needed for R, β* is 0.

    Args:
        weight_OD: W; append the bias as a column (`augment_bias`) where the layer has one.
        plus_DD: S₊, second moment of train inputs.
        minus_DD: S₋, of preserve inputs.
        rank: R, 1 <= R <= min(D, O).

    Raises:
        ValueError: rank outside 1..min(D, O).

    Source: SC-LoRA's reward, arXiv:2505.23724, Alg. 1; the choice of β is ours.
    """
    num_out, num_in = weight_OD.shape
    check_rank(rank, min(num_out, num_in))
    wide = solving_dtype(weight_OD)
    with full_precision():
        weight = weight_OD.to(wide)
        core_KD = weight if num_out <= num_in else thin_qr(weight)[1]
        plus_KK, minus_KK = (_congruent(core_KD, s.to(wide)) for s in (plus_DD, minus_DD))
        tolerance = torch.finfo(plus_DD.dtype).eps
        ridge = tolerance * float(plus_KK.diagonal().sum() + minus_KK.diagonal().sum())
        if ridge == 0.0:
            return 0.0
        gamma = float(_solve(plus_KK, minus_KK, ridge)[0][rank - 1])  # the exact one
    return max(gamma, 0.0) / (1 + max(gamma, 0.0))


def _congruent(core_KD: Tensor, moment_DD: Tensor) -> Tensor:
    product_KK = core_KD @ moment_DD @ core_KD.T
    return (product_KK + product_KK.T) / 2


def _solve(
    plus: Tensor, minus: Tensor, ridge: float, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """γ, descending, and their eigenvectors: all of them, or the R leading ones at least."""
    whitener = _whitener(minus, ridge)
    if rank is not None and is_small(rank, len(minus)):
        near = krylov_basis(
            lambda x: whitener.T @ (plus @ (whitener @ x)), whitener, rank, _sum_of_logarithms
        )
        if near is not None:
            reached = whitener @ near
            inner = reached.T @ plus @ reached
            gamma, vectors = torch.linalg.eigh((inner + inner.T) / 2)
            return gamma.flip(0), reached @ vectors.flip(1)
    whitened = whitener.T @ plus @ whitener
    gamma, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    return gamma.flip(0), whitener @ vectors.flip(1)


def _sum_of_logarithms(gamma_R: Tensor) -> Tensor:
    """So that every direction counts, and not the few of the largest γ alone."""
    return gamma_R.clamp_min(0).log1p().sum()


def _whitener(minus: Tensor, ridge: float) -> Tensor:
    """V with Vᵀ (C₋ + ridge I) V = I."""
    identity = torch.eye(len(minus), dtype=minus.dtype, device=minus.device)
    lower, failed = torch.linalg.cholesky_ex(minus + ridge * identity)
    if int(failed):
        values, axes = torch.linalg.eigh((minus + minus.T) / 2)
        spectral: Tensor = axes / (values.clamp_min(0) + ridge).sqrt()
        return spectral
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.T
