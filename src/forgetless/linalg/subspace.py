"""Subspaces picked by second moments: where preserve data are weak, where train data are strong."""

# Shape letters: D = layer input width, O = layer output width, R = rank, K = min(D, O).

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from forgetless.linalg.krylov import TOLERANCE, is_small, krylov_basis, orthonormal_outside
from forgetless.linalg.precision import full_precision, solving_dtype
from forgetless.linalg.thin_qr import thin_qr

_ROWS = 1024  # of a moment that are widened at a time
# Up to this width the whole spectrum of a contrast takes no longer than a part of it: where more
# directions are wanted than earn a reward, the last ones lie in a cluster near 0.
_WHOLE_SPECTRUM = 1024
# A sum of rewards that is as good as none, in units of what the contrast was made from: where fewer
# directions earn one than are asked for, all that is left to find are the last of these.
_SMALL_REWARD = 1e-2

# Energy of a direction, over the rounding of a factor, from which on the factor tells it apart.
_CLEAR = 100
_TOLD = 0.1  # the same from which on a step of refinement tells whether it did


def check_rank(rank: int, width: int) -> None:
    """Refuse a rank that no basis in `width` dimensions has.

    Raises:
        ValueError: rank outside 1..width.
    """
    if not 1 <= rank <= width:
        raise ValueError(f"basis: expected a rank in 1..{width}, got {rank}; lower the rank")


def null_basis(moment_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the `rank` directions that carry least energy, and their energies.

    Minimises tr(Uᵀ M U) over Uᵀ U = I. Not unique where the R-th and the (R+1)-th smallest
    eigenvalues are equal: compare projectors, never vectors.

    Where R is small beside D, by block Krylov iteration with the inverse of M, a Cholesky factor of
    which is all that is formed; else from the whole spectrum, in float64. The energy is within 1 %
    of the least one (docs/numerics.md).

    Args:
        moment_DD: E[x xᵀ], symmetric, activation².
        rank: R, 1 <= R <= D.

    Returns:
        basis_DR: columns by increasing energy; energies_R, activation²; dtype of `moment_DD`.

    Raises:
        ValueError: rank outside 1..D.

    Source: LoRA-Null, arXiv:2503.02659, Sec. 3.
    """
    check_rank(rank, moment_DD.shape[0])
    with full_precision():
        found = _partial_null(moment_DD, rank) if is_small(rank, moment_DD.shape[0]) else None
        if found is None:
            found = torch.linalg.eigh(moment_DD.to(solving_dtype(moment_DD)))
    values, vectors = found
    return vectors[:, :rank].to(moment_DD).contiguous(), values[:rank].to(moment_DD)


def top_basis(moment_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the `rank` directions that carry most energy, and their energies.

    Where R is small beside D, by block Krylov iteration; else from the whole spectrum, in float64.

    Args:
        moment_DD: E[x xᵀ] or a covariance, symmetric, activation².
        rank: R, 1 <= R <= D.

    Returns:
        basis_DR: columns by decreasing energy; energies_R, activation²; dtype of `moment_DD`.

    Raises:
        ValueError: rank outside 1..D.
    """
    check_rank(rank, moment_DD.shape[0])
    with full_precision():
        near_DM = None
        if is_small(rank, moment_DD.shape[0]):
            near_DM = krylov_basis(lambda x_DK: moment_DD @ x_DK, moment_DD, rank)
        if near_DM is None:
            values, vectors = torch.linalg.eigh(moment_DD.to(solving_dtype(moment_DD)))
        else:
            found = _ritz(moment_DD, near_DM)
            values, vectors = found.values_M, found.vectors_DM
    basis_DR = vectors[:, -rank:].flip(1).to(moment_DD).contiguous()
    return basis_DR, values[-rank:].flip(0).to(moment_DD)


def rounding_of(moment_DD: Tensor) -> float:
    """Energy that a direction of a stored moment may have by rounding alone: ε ‖M‖_F.

    Below it the choice among directions is chance.
    """
    largest = float(moment_DD.diagonal().max())  # no entry of a moment is larger
    if not largest > 0:
        return 0.0
    # Squares of entries may leave float32 where the entries do not.
    norms = [float((part / largest).norm()) for part in torch.split(moment_DD, _ROWS)]
    return torch.finfo(moment_DD.dtype).eps * largest * math.hypot(*norms)


def _partial_null(moment_DD: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Energies, ascending, and a basis of at least R directions; None where it does not converge.

    The inverse is that of M plus a shift of the size of its factor's rounding. Where directions
    carry hardly more than that, the rounding may pick others in their place: a step of refinement
    tells, and where it finds much less energy the factor is taken in float64.
    """
    trace = float(moment_DD.diagonal().sum())
    if not trace > 0:
        return None
    for dtype in (moment_DD.dtype, torch.float64):
        shift = torch.finfo(dtype).eps
        shifted_DD = moment_DD.to(dtype) / trace
        shifted_DD.diagonal().add_(shift)
        lower_DD, failed = torch.linalg.cholesky_ex(shifted_DD)
        if int(failed):
            continue
        near_DM = krylov_basis(partial(_solve_with, lower_DD), lower_DD, rank, _energy_of_inverses)
        if near_DM is None:
            return None
        found = _ritz(moment_DD, near_DM)
        energy, rounding = float(found.values_M[:rank].sum()), rank * shift * trace
        if dtype == torch.float64 or energy > _CLEAR * rounding:
            return found.values_M, found.vectors_DM
        if energy > _TOLD * rounding:
            found = _refined(moment_DD, lower_DD, found, rank)
            less = float(found.values_M[:rank].sum())
            if energy - less <= TOLERANCE * less:
                return found.values_M, found.vectors_DM
    return None


def _refined(moment_DD: Tensor, lower_DD: Tensor, found: _Ritz, rank: int) -> _Ritz:
    """The weakest directions after a block step of preconditioned descent, in float64.

    Residuals in float64 go through the factor of M, which need not be exact for that.
    """
    values_R, vectors_DR = found.values_M[:rank], found.vectors_DM[:, :rank]
    residuals_DR = found.images_DM[:, :rank] - vectors_DR * values_R
    tiny = torch.finfo(residuals_DR.dtype).tiny
    residuals_DR = torch.nn.functional.normalize(residuals_DR, dim=0, eps=tiny)
    steps_DR = _solve_with(lower_DD, residuals_DR.to(lower_DD)).double()
    kept_DM = found.vectors_DM[:, : 2 * rank]
    return _ritz(moment_DD, torch.cat([kept_DM, orthonormal_outside(steps_DR, kept_DM)], dim=1))


def _solve_with(lower_DD: Tensor, x_DK: Tensor) -> Tensor:
    return torch.cholesky_solve(x_DK, lower_DD)


def _energy_of_inverses(values_R: Tensor) -> Tensor:
    return (1 / values_R).sum()


@dataclass(frozen=True, slots=True)
class _Ritz:
    """Ritz values of M in a space, ascending, vectors V, and M V; float64."""

    values_M: Tensor
    vectors_DM: Tensor
    images_DM: Tensor


def _ritz(moment_DD: Tensor, near_DM: Tensor) -> _Ritz:
    """In the span of columns that are nearly orthonormal.

    M is widened a block of rows at a time, never as a whole.
    """
    near_DM = near_DM.double()
    upper_MM = torch.linalg.cholesky(near_DM.T @ near_DM, upper=True)  # the identity, nearly
    near_DM = torch.linalg.solve_triangular(upper_MM, near_DM, upper=True, left=False)
    rows = [part_ND.double() @ near_DM for part_ND in torch.split(moment_DD, _ROWS)]
    images_DM = torch.cat(rows)
    inner_MM = near_DM.T @ images_DM
    values_M, vectors_MM = torch.linalg.eigh((inner_MM + inner_MM.T) / 2)
    return _Ritz(values_M, near_DM @ vectors_MM, images_DM @ vectors_MM)


def leading_basis(moment_DD: Tensor, energy: float) -> Tensor:
    """Orthonormal basis (D, K) of the fewest leading directions that hold a share of the energy.

    Args:
        moment_DD: E[x xᵀ], symmetric, activation².
        energy: The share, above 0 and below 1. K is 0 for a moment of zeros.
    """
    with full_precision():
        values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    values_D = values_D.clamp_min(0).flip(0)
    total = float(values_D.sum())
    if total == 0.0:
        return moment_DD.new_zeros(moment_DD.shape[0], 0)
    count = int((values_D.cumsum(0) < energy * total).sum()) + 1
    basis_DK: Tensor = vectors_DD.flip(1)[:, :count].contiguous()
    return basis_DK


@dataclass(frozen=True, slots=True)
class ContrastBasis:
    """Top-R eigenvectors of W S Wᵀ for a symmetric, possibly indefinite S.

    Attributes:
        basis_OR: Orthonormal columns by decreasing eigenvalue.
        eigenvalues_R: Their eigenvalues, the reward of each direction.
        tolerance: Eigenvalues within ± this are zero to the rounding of S and of the solve.
    """

    basis_OR: Tensor
    eigenvalues_R: Tensor
    tolerance: float

    @property
    def num_positive(self) -> int:
        """How many of the R directions earn a positive reward."""
        return int((self.eigenvalues_R > self.tolerance).sum())

    @property
    def num_negative(self) -> int:
        """How many of the R directions cost more on preserve data than they gain on train data."""
        return int((self.eigenvalues_R < -self.tolerance).sum())


def contrast_basis(
    weight_OD: Tensor, contrast_DD: Tensor, rank: int, *, scale: float = 0.0
) -> ContrastBasis:
    """Top-R eigenvectors of the output-side matrix W S Wᵀ, from a problem of size min(D, O).

    Where O > D, the literal top-R of the O x O matrix goes on with directions outside range(W)
    (eigenvalue 0) before negative ones; these are completed deterministically.

    Solved in float64 where min(D, O) <= 4096 and the device has it, and cast back: eigenvalues
    span eight orders of magnitude, of which a float32 solve of that width tells four from zero.
    What is left is the rounding of S itself, so that the tolerance is λ·(ε(S) + K·ε(solve)), with λ
    the largest eigenvalue or `scale`, whichever is larger: S may be a small difference of two
    large moments, and is no more exact than they are.

    Args:
        weight_OD: W; append the bias as a column (`augment_bias`) where the layer has one.
        contrast_DD: S, symmetric.
        rank: R, 1 <= R <= O.
        scale: Size of what S was made from: the sum of the traces of W S₊ Wᵀ and W S₋ Wᵀ. Where
            min(D, O) is above 1024 and R small, the reward is found to 1 % of itself or to 0.01 %
            of this.

    Raises:
        ValueError: rank outside 1..O.

    Source: SC-LoRA, arXiv:2505.23724, Alg. 1; the reduction by W = QR is ours.
    """
    check_rank(rank, weight_OD.shape[0])
    wide = solving_dtype(weight_OD)
    with full_precision():
        basis_OR, values_R, tolerance = _solve_contrast(
            weight_OD.to(wide),
            contrast_DD.to(wide),
            rank,
            input_eps=torch.finfo(contrast_DD.dtype).eps,
            scale=scale,
        )
    return ContrastBasis(basis_OR.to(weight_OD), values_R.to(weight_OD), tolerance)


def _solve_contrast(
    weight_OD: Tensor, contrast_DD: Tensor, rank: int, *, input_eps: float, scale: float
) -> tuple[Tensor, Tensor, float]:
    """Basis, eigenvalues and tolerance of `contrast_basis`, in the dtype of the arguments."""
    num_out, num_in = weight_OD.shape
    if num_out <= num_in:
        small_KK = weight_OD @ contrast_DD @ weight_OD.T
        q_OK = None
    else:
        q_OK, r_KD = thin_qr(weight_OD)
        small_KK = r_KD @ contrast_DD @ r_KD.T
    values_K, vectors_KK = _leading((small_KK + small_KK.T) / 2, rank, _SMALL_REWARD * scale)
    solve_eps = small_KK.shape[0] * torch.finfo(values_K.dtype).eps
    tolerance = max(float(values_K.abs().max()), scale) * (input_eps + solve_eps)
    if q_OK is None:
        return vectors_KK[:, :rank].contiguous(), values_K[:rank], tolerance
    num_inside = min(int((values_K >= -tolerance).sum()), rank)
    num_outside = min(rank - num_inside, num_out - num_in)
    num_negative = rank - num_inside - num_outside
    inside_OK = q_OK @ vectors_KK[:, : num_inside + num_negative]
    outside_OR = _complement(q_OK, num_outside)
    basis_OR = torch.cat([inside_OK[:, :num_inside], outside_OR, inside_OK[:, num_inside:]], dim=1)
    values_R = torch.cat(
        [
            values_K[:num_inside],
            values_K.new_zeros(num_outside),
            values_K[num_inside : num_inside + num_negative],
        ]
    )
    return basis_OR, values_R, tolerance


def _leading(matrix_KK: Tensor, rank: int, small: float) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues, descending, and vectors: R of them at least, or all.

    Of a matrix wider than 1024 to a hundredth of their sum, or of `small` where that is more.
    """
    width = matrix_KK.shape[0]
    if width > _WHOLE_SPECTRUM and is_small(rank, width):
        near_KM = krylov_basis(lambda x_KN: matrix_KK @ x_KN, matrix_KK, rank, small=small)
        if near_KM is not None:
            inner_MM = near_KM.T @ matrix_KK @ near_KM
            values_M, vectors_MM = torch.linalg.eigh((inner_MM + inner_MM.T) / 2)
            return values_M.flip(0)[:rank], near_KM @ vectors_MM.flip(1)[:, :rank]
    values_K, vectors_KK = torch.linalg.eigh(matrix_KK)
    return values_K.flip(0), vectors_KK.flip(1)


def _complement(q_OK: Tensor, count: int) -> Tensor:
    """`count` orthonormal directions orthogonal to the columns of q, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    random_OR = torch.randn(q_OK.shape[0], count, generator=generator, dtype=torch.float64)
    random_OR = random_OR.to(q_OK)
    for _ in range(2):  # twice is enough for orthogonality to working precision
        random_OR = random_OR - q_OK @ (q_OK.T @ random_OR)
        random_OR = torch.linalg.qr(random_OR).Q
    return random_OR


def leakage(basis_DR: Tensor, moment_DD: Tensor) -> float:
    """Energy of M inside span(U), relative to what an isotropic subspace would hold.

    (d/r)·tr(Uᵀ M U)/tr(M): 1 for a random subspace, 0 for an exact null space. 0 where U is empty
    or M is zero.

    Args:
        basis_DR: U, orthonormal columns; R may be 0.
        moment_DD: M, activation².
    """
    trace = float(moment_DD.diagonal().sum())
    D, R = basis_DR.shape
    if R == 0 or trace == 0.0:
        return 0.0
    with full_precision():
        inside = float(((moment_DD @ basis_DR) * basis_DR).sum())
    return (D / R) * inside / trace
