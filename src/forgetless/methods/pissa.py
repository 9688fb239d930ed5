"""PiSSA: B0 A0 = the R largest singular triplets of W, √Σ on each side; both train.

Source: arXiv:2404.02948, Eq. 2 to 4. Deviations: the base keeps its weights and the adapter holds
the deviation from B0 A0, equal to the paper's residual form in exact arithmetic; the exact SVD, not
the paper's randomised one; alpha scales B0 A0 (PEFT divides Σ by the scale first; the same at
alpha = rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forgetless.linalg.singular import End, singular_part
from forgetless.methods.base import (
    LORAS_RATE,
    AdapterInit,
    LayerWeights,
    Method,
    SiteStatistics,
    Trains,
)

_BIBTEX = """\
@inproceedings{meng2024pissa,
  title = {{PiSSA}: Principal Singular Values and Singular Vectors Adaptation of Large Language
           Models},
  author = {Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2404.02948},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class PiSSA(Method):
    """PiSSA."""

    name: ClassVar[str] = "pissa"
    title: ClassVar[str] = "starts from the largest singular triplets of the weights"
    paper: ClassVar[str] = "PiSSA, arXiv:2404.02948"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = "none on preserve data; it changes what the weights do most"
    usual_form: ClassVar[Trains] = "both"
    usual_rate_source: ClassVar[str] = f"{LORAS_RATE}; the authors use 2e-5"
    end: ClassVar[End] = "top"

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """A0 = √Σ Vᵀ and B0 = U √Σ."""
        return AdapterInit(*singular_part(layer.weight_OD, self.rank, self.end).balanced())
