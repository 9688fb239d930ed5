"""LoRA: A0 Kaiming-uniform, B0 = 0, both train. The baseline that every comparison needs.

Source: arXiv:2106.09685, Sec. 4.1; the Kaiming start (a = √5) is that of its authors' code and of
PEFT. No deviation.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from forgetless.methods.base import (
    AdapterInit,
    LayerWeights,
    Method,
    SiteStatistics,
    Trains,
)

_BIBTEX = """\
@inproceedings{hu2022lora,
  title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and
            Li, Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  eprint = {2106.09685},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Plain LoRA."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "plain LoRA: random A, zero B, both train"
    paper: ClassVar[str] = "LoRA, arXiv:2106.09685"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = "none on preserve data; the baseline"
    usual_form: ClassVar[Trains] = "plain"
    draws: ClassVar[bool] = True
    usual_rate_source: ClassVar[str] = (
        "QLoRA, arXiv:2305.14314, Table 9 (7B and 13B); tune it: results differ most by rate"
    )

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """A0 uniform in ±1/√D, B0 zero."""
        num_out, num_in = layer.weight_OD.shape
        bound = 1 / math.sqrt(num_in)
        a_RD = torch.rand(self.rank, num_in, generator=generator, dtype=torch.float64)
        return AdapterInit(
            ((2 * a_RD - 1) * bound).to(layer.weight_OD),
            layer.weight_OD.new_zeros(num_out, self.rank),
        )


@dataclass(frozen=True, kw_only=True)
class LoRAWeightDecay(LoRA):
    """Plain LoRA with the weight decay that a public comparison found hard to beat."""

    name: ClassVar[str] = "lora-wd"
    title: ClassVar[str] = "plain LoRA with weight decay 0.3, towards the base"
    promise: ClassVar[str] = "a smaller update; nothing about its direction"
    default_weight_decay: ClassVar[float] = 0.3
