"""OLoRA: B0 = the first R columns of Q, A0 = the first R rows of R, from W = Q R; both train.

Source: arXiv:2406.01775, Alg. 1. Deviation: the base keeps its weights and the adapter holds the
deviation from B0 A0, equal to the paper's residual form in exact arithmetic.
"""

# Shape letters: O = layer output width, D = layer input width, K = min(D, O).

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forgetless.linalg.precision import full_precision
from forgetless.methods.base import (
    LOW_RATE,
    LOW_RATE_SOURCE,
    AdapterInit,
    LayerWeights,
    Method,
    SiteStatistics,
    Trains,
)

_BIBTEX = """\
@misc{buyukakyuz2024olora,
  title = {{OLoRA}: Orthonormal Low-Rank Adaptation of Large Language Models},
  author = {B{\\"u}y{\\"u}kaky{\\"u}z, Kerim},
  year = {2024},
  eprint = {2406.01775},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class OLoRA(Method):
    """OLoRA."""

    name: ClassVar[str] = "olora"
    title: ClassVar[str] = "starts from the QR decomposition of the weights"
    paper: ClassVar[str] = "OLoRA, arXiv:2406.01775"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = "none on preserve data"
    usual_rate: ClassVar[float] = LOW_RATE
    usual_rate_source: ClassVar[str] = LOW_RATE_SOURCE
    usual_form: ClassVar[Trains] = "both"

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """B0 = Q[:, :R], orthonormal, and A0 = R[:R]."""
        with full_precision():
            q_OK, r_KD = torch.linalg.qr(layer.weight_OD)
        return AdapterInit(r_KD[: self.rank].contiguous(), q_OK[:, : self.rank].contiguous())
