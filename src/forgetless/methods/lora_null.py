"""LoRA-Null: U = the R directions of least preserve energy; B0 A0 = balanced factors of W U Uᵀ.

With A frozen (v2, `trains: b`) ΔW x = (B - B0) A0 x stays near zero on preserve inputs for every B.
With both trained (v1) it only starts there.

Source: arXiv:2503.02659, Sec. 3. Deviations: activations enter unscaled and weighted per token
(the authors divide each sample by its signed maximum, in float16); the base keeps its weights and
the adapter holds the deviation from B0 A0, equal to the paper's residual form in exact arithmetic.
`start: basis` is the undocumented start of the authors' code: A0 = Uᵀ, B = 0.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from forgetless.linalg.lowrank import project_and_balance
from forgetless.linalg.subspace import leakage, null_basis, rounding_of
from forgetless.methods.base import (
    LORAS_RATE,
    MEASURED_RATE,
    UNDETERMINED,
    AdapterInit,
    LayerWeights,
    Method,
    Role,
    SiteBasis,
    SiteStatistics,
    Trains,
)

_BIBTEX = """\
@misc{tang2025loranull,
  title = {Put the Space of {LoRA} Initialization to the Extreme to Preserve Pre-trained Knowledge},
  author = {Tang, Pengwei and Hu, Xiaolin and Liu, Yong and Ding, Lizhong and Zhang, Dongjie and
            Wu, Xing and Zhang, Debing},
  year = {2025},
  eprint = {2503.02659},
  archivePrefix = {arXiv},
  note = {First version: {LoRA-Null}: Low-Rank Adaptation via Null Space for Large Language Models}
}"""


@dataclass(frozen=True, kw_only=True)
class LoRANull(Method):
    """LoRA-Null.

    Attributes:
        trains: `b` (v2, the default) or `both` (v1).
        start: `balanced` (the paper) or `basis` (A0 = Uᵀ).
    """

    trains: Literal["b", "both"] = "b"
    start: Literal["balanced", "basis"] = "balanced"

    name: ClassVar[str] = "lora-null"
    title: ClassVar[str] = "A starts in the null space of preserve activations"
    paper: ClassVar[str] = "LoRA-Null, arXiv:2503.02659"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = (
        "trains: b keeps every layer's output on inputs like the preserve data, whatever B "
        "becomes; trains: both only starts there"
    )
    usual_needs: ClassVar[frozenset[Role]] = frozenset({"preserve"})

    def __post_init__(self) -> None:
        """Check the options."""
        Method.__post_init__(self)
        self._require(
            self.trains in ("b", "both"), f"trains: expected b or both, got {self.trains!r}"
        )
        self._require(
            self.start in ("balanced", "basis"),
            f"start: expected balanced or basis, got {self.start!r}",
        )
        self._require(
            not (self.start == "basis" and self.trains == "both"),
            "start: basis has B0 = 0 and so nothing for `both` to deviate from; use trains: b",
        )

    @property
    def form(self) -> Trains:
        """`b` or `both`."""
        return self.trains

    @property
    def bottom_roles(self) -> frozenset[Role]:
        """The null space is that of preserve data."""
        return frozenset({"preserve"})

    @property
    def default_learning_rate(self) -> float:
        """1e-3 with A frozen, 2e-4 with both trained."""
        return 1e-3 if self.trains == "b" else 2e-4

    @property
    def learning_rate_source(self) -> str:
        """Source of the default rate."""
        return MEASURED_RATE if self.trains == "b" else LORAS_RATE

    def site_basis(self, site: str, stats: SiteStatistics) -> SiteBasis:
        """U: the weakest directions of preserve inputs."""
        moment_DD = stats.of("preserve", site).mean_DD()
        basis_DR, energies_R = null_basis(moment_DD, self.rank)
        undetermined = int((energies_R < rounding_of(moment_DD)).sum())
        found = {"leakage_calibration": leakage(basis_DR, moment_DD), UNDETERMINED: undetermined}
        return SiteBasis(basis_DR, found)

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """A0 spans the null space; B0 A0 = W U Uᵀ (`balanced`)."""
        site = self._basis_of(layer, stats)
        basis_DR = site.basis_DR.to(layer.weight_OD)
        if self.start == "basis":
            zero_OR = layer.weight_OD.new_zeros(layer.weight_OD.shape[0], self.rank)
            return AdapterInit(basis_DR.T.contiguous(), zero_OR, dict(site.diagnostics))
        a_RD, b_OR = project_and_balance(layer.weight_OD, basis_DR)
        return AdapterInit(a_RD, b_OR, dict(site.diagnostics))
