"""MiLoRA: PiSSA from the other end, the R smallest singular triplets of W; both train.

Source: arXiv:2406.09044, Sec. 3. Deviation: the base keeps its weights and the adapter holds the
deviation from B0 A0, equal to the paper's residual form in exact arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from forgetless.linalg.singular import End
from forgetless.methods.base import LORAS_RATE
from forgetless.methods.pissa import PiSSA

_BIBTEX = """\
@misc{wang2024milora,
  title = {{MiLoRA}: Harnessing Minor Singular Components for Parameter-Efficient {LLM} Finetuning},
  author = {Wang, Hanqing and Li, Yixia and Wang, Shuo and Chen, Guanhua and Chen, Yun},
  year = {2024},
  eprint = {2406.09044},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class MiLoRA(PiSSA):
    """MiLoRA."""

    name: ClassVar[str] = "milora"
    title: ClassVar[str] = "starts from the smallest singular triplets of the weights"
    paper: ClassVar[str] = "MiLoRA, arXiv:2406.09044"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = (
        "starts where the weights do least, whatever the data; bounds nothing afterwards"
    )
    usual_rate_source: ClassVar[str] = LORAS_RATE
    end: ClassVar[End] = "bottom"
