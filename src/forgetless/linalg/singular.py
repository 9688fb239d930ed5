"""Parts of a singular value decomposition, and the balanced factors that methods start from."""

# Shape letters: O = layer output width, D = layer input width, R = rank, K = min(D, O).

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forgetless.linalg.precision import full_precision

End = Literal["top", "bottom"]


@dataclass(frozen=True, slots=True)
class SingularPart:
    """R singular triplets of a matrix, by decreasing singular value.

    Attributes:
        left_OR: Left singular vectors.
        sigma_R: Singular values.
        right_RD: Right singular vectors, as rows.
    """

    left_OR: Tensor
    sigma_R: Tensor
    right_RD: Tensor

    def balanced(self) -> tuple[Tensor, Tensor]:
        """A = √Σ Vᵀ (R, D) and B = U √Σ (O, R)."""
        root_R = self.sigma_R.sqrt()
        return root_R[:, None] * self.right_RD, self.left_OR * root_R


def singular_part(matrix_OD: Tensor, rank: int, end: End) -> SingularPart:
    """The R triplets of largest or smallest singular value, from a thin SVD.

    Args:
        matrix_OD: Any matrix; solved in its dtype.
        rank: R, 1 <= R <= min(D, O).
        end: Which end of the spectrum.

    Raises:
        ValueError: rank outside 1..min(D, O).
    """
    width = min(matrix_OD.shape)
    if not 1 <= rank <= width:
        raise ValueError(f"singular part: expected a rank in 1..{width}, got {rank}; lower it")
    with full_precision():
        left_OK, sigma_K, right_KD = torch.linalg.svd(matrix_OD, full_matrices=False)
    kept = slice(0, rank) if end == "top" else slice(width - rank, width)
    return SingularPart(left_OK[:, kept].contiguous(), sigma_K[kept], right_KD[kept].contiguous())
