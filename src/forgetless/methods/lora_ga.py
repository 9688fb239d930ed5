"""LoRA-GA: the first gradient G = U Σ Vᵀ; A0 = c V[:R]ᵀ, B0 = c U[R:2R], c = O^¼ / √γ; both train.

So the first step of the adapter is the best rank-2R approximation of a step of full fine-tuning.

Source: arXiv:2407.05000, Alg. 1. Deviations: the base keeps its weights and the adapter holds the
deviation from B0 A0, equal to the paper's residual form in exact arithmetic; the scale is alpha / R
as for every method here (the paper's is `rslora: true`); the gradient is that of the mean loss over
the completion tokens of `gradient_rows` train rows. PEFT 0.21 multiplies B0 by Σ and scales B0
alone; the subspaces are the same.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forgetless.linalg.singular import singular_part
from forgetless.methods.base import (
    AdapterInit,
    LayerWeights,
    Method,
    SiteStatistics,
    Trains,
)

_BIBTEX = """\
@inproceedings{wang2024loraga,
  title = {{LoRA-GA}: Low-Rank Adaptation with Gradient Approximation},
  author = {Wang, Shaowen and Yu, Linxi and Li, Jian},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2407.05000},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Method):
    """LoRA-GA.

    Attributes:
        gradient_rows: Train rows whose gradient is taken, the first ones.
        gamma: γ; larger starts smaller.
    """

    gradient_rows: int = 64
    gamma: float = 16.0

    name: ClassVar[str] = "lora-ga"
    title: ClassVar[str] = "starts along the first gradient of full fine-tuning"
    paper: ClassVar[str] = "LoRA-GA, arXiv:2407.05000"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = "none on preserve data; it learns fast on train data"
    usual_form: ClassVar[Trains] = "both"

    def __post_init__(self) -> None:
        """Check the options."""
        Method.__post_init__(self)
        self._require(
            self.gradient_rows >= 1,
            f"gradient_rows: expected 1 or more, got {self.gradient_rows}",
        )
        self._require(self.gamma > 0, f"gamma: expected a number above 0, got {self.gamma}")

    @property
    def rows_for_gradient(self) -> int:
        """As the option says."""
        return self.gradient_rows

    def check_layer(self, layer: str, in_features: int, out_features: int) -> None:
        """Refuse a layer that is narrower than twice the rank.

        Raises:
            MethodError: 2 rank above min(in_features, out_features).
        """
        most = min(in_features, out_features) // 2
        self._require(
            self.rank <= most,
            f"rank: expected at most {most}, half the smaller width of layer {layer} "
            f"({out_features} x {in_features}), got {self.rank}; lower the rank or leave the layer "
            "out of the targets",
        )

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """A0 from the first R triplets of the gradient, B0 from the next R."""
        gradient_OD = stats.first_gradient(layer.name).to(layer.weight_OD)
        part = singular_part(gradient_OD, 2 * self.rank, "top")
        scale = gradient_OD.shape[0] ** 0.25 / self.gamma**0.5
        return AdapterInit(
            (part.right_RD[: self.rank] * scale).contiguous(),
            (part.left_OR[:, self.rank :] * scale).contiguous(),
        )
