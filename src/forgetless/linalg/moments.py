"""Second moments of activations: the one statistic that the methods need."""

# Shape letters in this file: T = kept tokens, D = layer input width, O = layer output width.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forgetless.errors import CalibrationError
from forgetless.linalg.gram import add_gram_
from forgetless.linalg.precision import full_precision


@dataclass(slots=True)
class SecondMoment:
    """Running sums of x xᵀ and x over tokens, for one site.

    Sums and counts are kept apart, so that merging depends neither on order nor on
    batching nor on the number of processes (up to rounding).

    Attributes:
        lower_DD: Sum of x xᵀ, float32 or wider, on and below the diagonal; above it stands nothing
            that counts. Unit: activation².
        sum_D: Sum of x. Unit: activation.
        num_tokens: Tokens summed; padding is never counted.
        num_samples: Rows that these tokens came from.
    """

    lower_DD: Tensor
    sum_D: Tensor
    num_tokens: int = 0
    num_samples: int = 0

    @classmethod
    def zeros(
        cls, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> SecondMoment:
        """Empty sums for a site of `width`; `dtype` is widened to float32 at least."""
        dtype = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(width, width, dtype=dtype, device=device),
            torch.zeros(width, dtype=dtype, device=device),
        )

    @property
    def width(self) -> int:
        """D."""
        return self.sum_D.shape[0]

    def add_(self, x_TD: Tensor, *, num_samples: int = 0) -> None:
        """Add tokens (T, D) of any float dtype; T may be 0.

        No product is rounded to less than the dtype of the sums (TF32 included).

        Raises:
            CalibrationError: Wrong shape.
        """
        if x_TD.ndim != 2 or x_TD.shape[1] != self.width:
            raise CalibrationError(
                f"second moment: expected tokens of shape (T, {self.width}), "
                f"got {tuple(x_TD.shape)}; flatten (batch, sequence) and drop padding first"
            )
        add_gram_(self.lower_DD, self.sum_D, x_TD)
        self.num_tokens += x_TD.shape[0]
        self.num_samples += num_samples

    def merge_(self, other: SecondMoment) -> None:
        """Add the sums and counts of `other`, which may live on another device.

        Raises:
            CalibrationError: The widths differ.
        """
        if other.width != self.width:
            raise CalibrationError(
                f"second moment: expected a moment of width {self.width} to merge, "
                f"got {other.width}; both must come from the same site"
            )
        self.lower_DD.add_(other.lower_DD.to(self.lower_DD))
        self.sum_D.add_(other.sum_D.to(self.sum_D))
        self.num_tokens += other.num_tokens
        self.num_samples += other.num_samples

    def to(self, device: torch.device) -> SecondMoment:
        """The same on another device; itself where it lies there."""
        if self.lower_DD.device == device:
            return self
        sums = self.lower_DD.to(device), self.sum_D.to(device)
        return SecondMoment(*sums, self.num_tokens, self.num_samples)

    def weigh_(self, factor: float) -> None:
        """Multiply both sums, so that each token counts `factor` times; the counts stay."""
        self.lower_DD.mul_(factor)
        self.sum_D.mul_(factor)

    def mean_DD(self) -> Tensor:
        """E[x xᵀ], symmetric, (D, D); zeros where no token was counted."""
        lower_DD = self.lower_DD.tril() / max(self.num_tokens, 1)
        return lower_DD + lower_DD.tril(-1).T

    def mean_D(self) -> Tensor:
        """E[x], (D,)."""
        return self.sum_D / max(self.num_tokens, 1)


def output_energy(weight_OD: Tensor, moment_DD: Tensor) -> Tensor:
    """tr(W M Wᵀ): mean squared norm of W x over the tokens of M, without forming O x O."""
    with full_precision():
        return ((weight_OD @ moment_DD) * weight_OD).sum()


def moment_drift(core_RD: Tensor, weight_OD: Tensor, moment_DD: Tensor) -> float:
    """tr(ΔW M ΔWᵀ) / tr(W M Wᵀ), without unit; 0 where both are 0.

    Args:
        core_RD: C with ‖C x‖ = ‖ΔW x‖ for every x; computed with in its dtype.
        weight_OD: W.
        moment_DD: M.
    """
    moment_DD = moment_DD.to(core_RD)
    kept = float(output_energy(weight_OD.to(core_RD), moment_DD))
    # Where ΔW reads almost nothing of M, rounding may leave less than nothing.
    return max(float(output_energy(core_RD, moment_DD)), 0.0) / kept if kept else 0.0


def drift_bound(core_RD: Tensor, weight_OD: Tensor, moment_DD: Tensor, basis_DP: Tensor) -> float:
    """λ ‖ΔW‖_F² / tr(W M Wᵀ), above the drift of every ΔW with rows in span(U); 0 where both are 0.

    Then ΔW = ΔW U Uᵀ, and tr(ΔW M ΔWᵀ) = tr(ΔW U (Uᵀ M U) Uᵀ ΔWᵀ) <= λ ‖ΔW‖_F² with λ the largest
    eigenvalue of Uᵀ M U. It says nothing about data with another moment than M.

    Args:
        core_RD: C with ‖C x‖ = ‖ΔW x‖ for every x, so that ‖C‖_F = ‖ΔW‖_F.
        weight_OD: W.
        moment_DD: M.
        basis_DP: U, orthonormal columns, such as the row space of a frozen A.
    """
    moment_DD, basis_DP = moment_DD.to(core_RD), basis_DP.to(core_RD)
    kept = float(output_energy(weight_OD.to(core_RD), moment_DD))
    if basis_DP.shape[1] == 0 or not kept:
        return 0.0
    with full_precision():
        inner_PP = basis_DP.T @ moment_DD @ basis_DP
        largest = float(torch.linalg.eigvalsh((inner_PP + inner_PP.T) / 2)[-1])
    return max(largest, 0.0) * float(core_RD.square().sum()) / kept


def augment_bias(
    weight_OD: Tensor, bias_O: Tensor | None, moment_DD: Tensor, mean_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Write h = W x + b as h = W' x' with x' = [x; 1], so that E[h hᵀ] = W' S' W'ᵀ.

    Returns:
        W' = [W b] and S' = E[x' x'ᵀ]; the arguments as they are where there is no bias.

    Source: E[hhᵀ] = W M Wᵀ + W μ bᵀ + b μᵀ Wᵀ + b bᵀ, expanded.
    """
    if bias_O is None:
        return weight_OD, moment_DD
    top_DD1 = torch.cat([moment_DD, mean_D[:, None]], dim=1)
    last_1D1 = torch.cat([mean_D, mean_D.new_ones(1)])[None]
    return torch.cat([weight_OD, bias_O[:, None]], dim=1), torch.cat([top_DD1, last_1D1], dim=0)
