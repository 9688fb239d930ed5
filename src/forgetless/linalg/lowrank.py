"""Low-rank factors of a weight update: ΔW = B A."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank,
# K = rank before truncation, P = min(O, K), S = directions of P that are not kept.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forgetless.linalg.precision import full_precision

_BLOCK = 1024  # columns of a moment that are widened to float64 at a time


def project_and_balance(weight_OD: Tensor, basis_DR: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of W U Uᵀ: B = U'√Σ and A = √Σ V'ᵀ Uᵀ from the thin SVD W U = U' Σ V'ᵀ.

    Equal to the SVD of the D-wide matrix W U Uᵀ, at the cost of one of width R.

    Args:
        weight_OD: W.
        basis_DR: U, orthonormal columns, R <= min(D, O).

    Returns:
        A (R, D) and B (O, R), with B A = W U Uᵀ and A Aᵀ = Bᵀ B = Σ.

    Source: LoRA-Null, arXiv:2503.02659, Sec. 3 (step 2 of the algorithm).
    """
    with full_precision():
        left_OR, sigma_R, right_RR = torch.linalg.svd(weight_OD @ basis_DR, full_matrices=False)
        root_R = sigma_R.sqrt()
        return root_R[:, None] * (right_RR @ basis_DR.T), left_OR * root_R


def concatenated_delta(
    a_RD: Tensor, b_OR: Tensor, fixed_A_RD: Tensor, fixed_B_OR: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact rank-2R factors of (B0 + b)(A0 + a) - B0 A0 = (B0 + b) a + b A0.

    Returns:
        A = [a; A0] (2R, D) and B = [B0 + b, b] (O, 2R).
    """
    return torch.cat([a_RD, fixed_A_RD], dim=0), torch.cat([fixed_B_OR + b_OR, b_OR], dim=1)


def isometric_core(a_RD: Tensor, b_OR: Tensor) -> Tensor:
    """C (R', D), R' = min(O, R), with ‖C x‖ = ‖B A x‖ for every x: T A, where B = Q T (thin QR)."""
    with full_precision():
        core_RD: Tensor = torch.linalg.qr(b_OR).R @ a_RD
    return core_RD


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """‖B A − B' A'‖ and ‖B A‖ in the Frobenius norm, without forming an O x D matrix.

    Args:
        one: A (R, D) and B (O, R).
        other: A' (R', D) and B' (O, R'); R' may differ from R.

    Returns:
        Two scalars, float64 where the device has it.
    """
    wide = torch.float32 if one[0].device.type == "mps" else torch.float64
    (a_RD, b_OR), (other_a, other_b) = ((a.to(wide), b.to(wide)) for a, b in (one, other))
    with full_precision():
        return (
            _product_norm(torch.cat([a_RD, other_a]), torch.cat([b_OR, -other_b], dim=1)),
            _product_norm(a_RD, b_OR),
        )


def _product_norm(a_RD: Tensor, b_OR: Tensor) -> Tensor:
    """‖B A‖ from the triangular factors of B and Aᵀ."""
    core_RR: Tensor = torch.linalg.qr(b_OR).R @ torch.linalg.qr(a_RD.T).R.T
    norm: Tensor = torch.linalg.matrix_norm(core_RR)
    return norm


def row_space(a_RD: Tensor) -> Tensor:
    """Orthonormal basis (D, R') of the row space of A, R' its numerical rank (0 for A = 0)."""
    _, sigma_K, right_KD = torch.linalg.svd(a_RD, full_matrices=False)
    if sigma_K.numel() == 0 or float(sigma_K[0]) == 0.0:
        return a_RD.new_zeros(a_RD.shape[1], 0)
    tolerance = float(sigma_K[0]) * max(a_RD.shape) * torch.finfo(a_RD.dtype).eps
    basis_DR: Tensor = right_KD[sigma_K > tolerance].T
    return basis_DR.contiguous()


def core_and_row_space(delta_OD: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """What `isometric_core` and `row_space` are of factors, of a ΔW that is known as a whole.

    Args:
        delta_OD: ΔW, a difference of two stored weights.
        rounding: Spectral norm that their rounding alone can give a difference; directions below it
            are not counted.

    Returns:
        C (P, D), P = min(O, D), with ‖C x‖ = ‖ΔW x‖ for every x, and an orthonormal basis (D, R) of
        the R directions above `rounding`.
    """
    with full_precision():
        _, sigma_P, right_PD = torch.linalg.svd(delta_OD, full_matrices=False)
    basis_DR: Tensor = right_PD[sigma_P > rounding].T
    return sigma_P[:, None] * right_PD, basis_DR.contiguous()


@dataclass(frozen=True, slots=True)
class Truncation:
    """Factors of a lower rank, and what that cost in the metric of a second moment M.

    Attributes:
        a_RD: A'.
        b_OR: B'.
        energy: tr(ΔW M ΔWᵀ), of the update as it was.
        lost: tr((ΔW - ΔW') M (ΔW - ΔW')ᵀ); tr(ΔW' M ΔW'ᵀ) is `energy` less this.
    """

    a_RD: Tensor
    b_OR: Tensor
    energy: float
    lost: float


def truncate(a_KD: Tensor, b_OK: Tensor, rank: int, moment_DD: Tensor | None = None) -> Truncation:
    """The ΔW' of rank R that minimises tr((ΔW - ΔW') M (ΔW - ΔW')ᵀ), for ΔW = B A of rank K.

    With X = ΔW M^½ and U its top R left singular vectors, the best X' is U Uᵀ X, so that
    ΔW' = U Uᵀ ΔW: neither a root nor an inverse of M is formed, and M may be singular. With
    B = Q T (thin QR) the U are Q times the top eigenvectors of T A M Aᵀ Tᵀ, which is K x K.

    Where fewer than R directions carry energy in M, the choice of the others costs nothing there;
    they are spent on what is left of ΔW in the identity metric. Solved in float64.

    Args:
        a_KD: A.
        b_OK: B.
        rank: R, 1 or more. Where K <= R, the factors come back as they are.
        moment_DD: M, symmetric, positive semidefinite up to rounding; the identity where None.

    Returns:
        Balanced factors, A' A'ᵀ = B'ᵀ B' diagonal, of rank min(R, O) in the dtype of A.

    Raises:
        ValueError: rank below 1.

    Source: Eckart and Young; that M^½ cancels is the line above.
    """
    if rank < 1:
        raise ValueError(f"truncation: expected a rank of 1 or more, got {rank}; raise it")
    device = torch.device("cpu") if a_KD.device.type == "mps" else a_KD.device  # no float64 there
    q_OP, t_PK = torch.linalg.qr(b_OK.to(device, torch.float64))
    core_PD = t_PK @ a_KD.to(device, torch.float64)  # ΔW = Q core
    energy_PP = _gram(core_PD, moment_DD)
    energy = float(energy_PP.diagonal().sum().clamp_min(0))
    if a_KD.shape[0] <= rank:
        return Truncation(a_KD, b_OK, energy, 0.0)
    eps = torch.finfo(a_KD.dtype if moment_DD is None else moment_DD.dtype).eps
    kept_PR, dropped_PS = _split(energy_PP, core_PD, min(rank, energy_PP.shape[0]), eps)
    lost = float(((energy_PP @ dropped_PS) * dropped_PS).sum().clamp_min(0))
    left_RR, sigma_R, right_RD = torch.linalg.svd(kept_PR.T @ core_PD, full_matrices=False)
    root_R = sigma_R.sqrt()
    return Truncation(
        (root_R[:, None] * right_RD).to(a_KD),
        ((q_OP @ kept_PR @ left_RR) * root_R).to(b_OK),
        energy,
        lost,
    )


def _gram(core_PD: Tensor, moment_DD: Tensor | None) -> Tensor:
    """C M Cᵀ in float64; M is widened a block of columns at a time, never as a whole."""
    if moment_DD is None:
        return core_PD @ core_PD.T
    blocks = [core_PD @ block.to(core_PD) for block in torch.split(moment_DD, _BLOCK, dim=1)]
    gram_PP = torch.cat(blocks, dim=1) @ core_PD.T
    return (gram_PP + gram_PP.T) / 2


def _split(energy_PP: Tensor, core_PD: Tensor, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    """Orthonormal directions to keep (P, R) and to drop (P, P - R)."""
    values_P, vectors_PP = torch.linalg.eigh(energy_PP)
    values_P, vectors_PP = values_P.flip(0), vectors_PP.flip(1)
    tolerance = float(values_P.abs().max()) * eps
    num_heard = min(int((values_P > tolerance).sum()), rank)
    if num_heard == rank:
        return vectors_PP[:, :rank], vectors_PP[:, rank:]
    silent_PS = vectors_PP[:, num_heard:]
    rest_SD = silent_PS.T @ core_PD
    order_SS = torch.linalg.eigh(rest_SD @ rest_SD.T).eigenvectors.flip(1)
    silent_PS = silent_PS @ order_SS
    cut = rank - num_heard
    return torch.cat([vectors_PP[:, :num_heard], silent_PS[:, :cut]], dim=1), silent_PS[:, cut:]
