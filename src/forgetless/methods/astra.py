"""Astra: B0 = the R leading eigenvectors of the train outputs' E[h hᵀ], A0 = B0ᵀ W; both train.

SC-LoRA with β = 0: nothing is asked of preserve data.

Source: arXiv:2602.19111 and its authors' code, whose eigenvalues ascend: the "tail" of the title is
the end of largest eigenvalues (`IPM`). Deviations: those of SC-LoRA, and every layer has the same
rank (their optional redistribution is off in their own scripts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forgetless.methods.base import (
    LOW_RATE,
    LOW_RATE_SOURCE,
    AdapterInit,
    LayerWeights,
    Method,
    Role,
    SiteStatistics,
    Trains,
)
from forgetless.methods.sc_lora import SCLoRA

_BIBTEX = """\
@misc{liu2026astra,
  title = {Astra: Activation-Space Tail-Eigenvector Low-Rank Adaptation of Large Language Models},
  author = {Liu, Kainan and Zhang, Yong and Cheng, Ning and Zhu, Yun and Wang, Yanmeng and
            Wang, Shaojun and Xiao, Jing},
  year = {2026},
  eprint = {2602.19111},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class Astra(Method):
    """Astra."""

    name: ClassVar[str] = "astra"
    title: ClassVar[str] = "output confined to where train data are strong (SC-LoRA at beta 0)"
    paper: ClassVar[str] = "Astra, arXiv:2602.19111"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = "none on preserve data; it learns fast on train data"
    usual_form: ClassVar[Trains] = "both"
    usual_needs: ClassVar[frozenset[Role]] = frozenset({"train"})
    usual_rate: ClassVar[float] = LOW_RATE
    usual_rate_source: ClassVar[str] = f"{LOW_RATE_SOURCE}; the authors use 2e-5"

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """As SC-LoRA, without preserve data."""
        found = SCLoRA(rank=self.rank, alpha=self.alpha, beta=0).init(layer, stats, generator)
        return AdapterInit(found.a_RD, found.b_OR)
