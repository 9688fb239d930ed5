"""MiCA: B0 = the R left singular vectors of W of smallest singular value, frozen; A0 = 0 trains.

Source: arXiv:2604.01694. No deviation.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forgetless.linalg.singular import singular_part
from forgetless.methods.base import (
    LORAS_RATE,
    AdapterInit,
    LayerWeights,
    Method,
    SiteStatistics,
    Trains,
)

_BIBTEX = """\
@misc{rudiger2026mica,
  title = {{MiCA} Learns More Knowledge Than {LoRA} and Full Fine-Tuning},
  author = {R{\\"u}diger, Sten and Raschka, Sebastian},
  year = {2026},
  eprint = {2604.01694},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class MiCA(Method):
    """MiCA."""

    name: ClassVar[str] = "mica"
    title: ClassVar[str] = "output confined to the directions that the weights use least"
    paper: ClassVar[str] = "MiCA, arXiv:2604.01694"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = (
        "each layer's change stays in the output directions of the weights' smallest singular "
        "values; nothing about the input side"
    )
    usual_form: ClassVar[Trains] = "a"
    usual_rate_source: ClassVar[str] = (
        f"{LORAS_RATE}; the authors advise half of LoRA's rank and twice its rate"
    )

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """B0 = U of the smallest singular values."""
        part = singular_part(layer.weight_OD, self.rank, "bottom")
        return AdapterInit(torch.zeros_like(part.right_RD), part.left_OR)
