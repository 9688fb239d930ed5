"""Full fine-tuning: W' = W + ΔW, every parameter trains; the baseline that LoRA came from.

Deviation from AdamW: weight decay, where it is set, pulls to the base and not to 0, as for every
form of adapter here: W' ← W' - ηλ (W' - W) before each step. A pull to the start is L2-SP's,
arXiv:1802.01483; AdamW's own decay would take away what the base knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from forgetless.methods.base import AnyMethod, Held

_BIBTEX = """\
@inproceedings{li2018explicit,
  title = {Explicit Inductive Bias for Transfer Learning with Convolutional Networks},
  author = {Li, Xuhong and Grandvalet, Yves and Davoine, Franck},
  booktitle = {International Conference on Machine Learning},
  year = {2018},
  eprint = {1802.01483},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(AnyMethod):
    """Every parameter of a second copy of the base."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "full fine-tuning: every weight of a second copy of the base trains"
    paper: ClassVar[str] = "no paper of its own; weight decay to the base after arXiv:1802.01483"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = "none on preserve data; small models: memory for four to five copies"
    usual_rate: ClassVar[float] = 2e-5
    usual_rate_source: ClassVar[str] = (
        "the rate usual for 7B models (Alpaca's script, and others after it); on SmolLM2-135M it "
        "forgot less than at 1e-4, and gained less (docs/results.md)"
    )

    @property
    def form(self) -> Held:
        """No adapter: every weight."""
        return "full"
