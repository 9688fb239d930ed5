"""CorDA: SVD of W C = U Σ Vᵀ, C = E[x xᵀ]; B0 = U √Σ, A0 = √Σ Vᵀ C⁻¹; both train.

KPM takes the last R triplets, C from preserve data; IPM the first R, C from train data.

Source: arXiv:2406.05223, Sec. 3.2 and 3.3. Since Uᵀ W C = Σ Vᵀ, A0 = Σ^(-1/2) Uᵀ W: no inverse is
formed, and B0 A0 = U Uᵀ W exactly, however ill-conditioned C is. Deviations: activations enter
unscaled and weighted per token (the authors divide each sample by its signed maximum); the damping
of C's diagonal stays at its first value, where the authors double it until their inverse is
accurate; the base keeps its weights and the adapter holds the deviation from B0 A0.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from forgetless.linalg.precision import full_precision, solving_dtype
from forgetless.linalg.singular import End, singular_part
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

_BIBTEX = """\
@inproceedings{yang2024corda,
  title = {{CorDA}: Context-Oriented Decomposition Adaptation of Large Language Models for
           Task-Aware Parameter-Efficient Fine-tuning},
  author = {Yang, Yibo and Li, Xiaojie and Zhou, Zhongzhu and Song, Shuaiwen Leon and
            Wu, Jianlong and Nie, Liqiang and Ghanem, Bernard},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2406.05223},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class CorDA(Method):
    """CorDA.

    Attributes:
        mode: `kpm` (knowledge-preserved: last triplets, preserve data) or `ipm`
            (instruction-previewed: first triplets, train data).
        damping: Added to C's diagonal, as a share of its mean.
    """

    mode: Literal["kpm", "ipm"] = "kpm"
    damping: float = 0.01

    name: ClassVar[str] = "corda"
    title: ClassVar[str] = "starts from the weights' triplets that data use least (or most)"
    paper: ClassVar[str] = "CorDA, arXiv:2406.05223"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = (
        "kpm starts in the outputs that preserve data reach least; bounds nothing afterwards"
    )
    usual_form: ClassVar[Trains] = "both"
    usual_rate: ClassVar[float] = LOW_RATE
    usual_rate_source: ClassVar[str] = f"{LOW_RATE_SOURCE}; the authors use 2e-5"

    def __post_init__(self) -> None:
        """Check the options."""
        Method.__post_init__(self)
        self._require(self.mode in ("kpm", "ipm"), f"mode: expected kpm or ipm, got {self.mode!r}")
        self._require(
            self.damping >= 0, f"damping: expected a number, 0 or more, got {self.damping}"
        )

    @property
    def _role(self) -> Role:
        return "preserve" if self.mode == "kpm" else "train"

    @property
    def needs(self) -> frozenset[Role]:
        """Preserve data (`kpm`) or train data (`ipm`)."""
        return frozenset({self._role})

    @property
    def bottom_roles(self) -> frozenset[Role]:
        """`kpm` picks the weakest triplets."""
        return frozenset({"preserve"}) if self.mode == "kpm" else frozenset()

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """B0 = U √Σ and A0 = Σ^(-1/2) Uᵀ W."""
        wide = solving_dtype(layer.weight_OD)
        weight_OD = layer.weight_OD.to(wide)
        moment_DD = stats.of(self._role, layer.name).mean_DD().to(weight_OD)
        moment_DD.diagonal().add_(self.damping * moment_DD.diagonal().mean())
        end: End = "bottom" if self.mode == "kpm" else "top"
        with full_precision():
            weighted_OD = weight_OD @ moment_DD
            part = singular_part(weighted_OD, self.rank, end)
            # Below this, a singular value is rounding: U stays what it is, and the split is capped.
            floor = torch.finfo(wide).eps * torch.linalg.matrix_norm(weighted_OD)
            root_R = part.sigma_R.clamp_min(floor).clamp_min(torch.finfo(wide).tiny).sqrt()
            a_RD = (part.left_OR.T @ weight_OD) / root_R[:, None]
        return AdapterInit(a_RD.to(layer.weight_OD), (part.left_OR * root_R).to(layer.weight_OD))
