"""Low-rank factors of a weight update: ΔW = B A."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.linalg.precision import full_precision


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
