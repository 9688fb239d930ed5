"""Contrastive input basis: top R of C₊ v = γ (C₋ + ε I) v, A0 = their orthonormal basis, frozen.

γ is train energy for each unit of preserve energy: A reads the inputs that train data have and
preserve data lack, and B alone trains.

Source: the generalised Rayleigh quotient of FoLoRA, arXiv:2606.00132. Deviation: FoLoRA gates Adam
updates in that basis; here its leading directions are the frozen A of an ordinary LoRA.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forgetless.linalg.generalised import generalised_basis
from forgetless.linalg.subspace import leakage
from forgetless.methods.base import (
    TRIED,
    AdapterInit,
    LayerWeights,
    Method,
    Role,
    SiteBasis,
    SiteStatistics,
    Trains,
)

_BIBTEX = """\
@misc{kim2026folora,
  title = {Foundation-Preserving Adaptation via Generalized Rayleigh-Quotient Optimization},
  author = {Kim, Dongjun and de Wynter, Adrian and Chen, Huancheng and Kim, Heasung and
            Vikalo, Haris},
  year = {2026},
  eprint = {2606.00132},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class ContrastiveBasis(Method):
    """Contrastive input basis.

    Attributes:
        epsilon: ε as a share of the mean eigenvalue of C₋: directions that preserve data use less
            than this count alike, and the stronger in train data wins.
    """

    epsilon: float = 1e-3

    name: ClassVar[str] = "contrastive"
    title: ClassVar[str] = "A reads the inputs that train data have and preserve data lack"
    paper: ClassVar[str] = "after FoLoRA, arXiv:2606.00132"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = (
        "A is frozen where train inputs are strong for what preserve inputs are: the change on "
        "preserve data is bounded by the share of them that A reads (leakage)"
    )
    usual_form: ClassVar[Trains] = "b"
    usual_needs: ClassVar[frozenset[Role]] = frozenset({"train", "preserve"})
    usual_rate: ClassVar[float] = 1e-3
    usual_rate_source: ClassVar[str] = (
        "of 2e-4, 1e-3 and 3e-3 the one that reached plain LoRA's best gain and forgot least "
        f"{TRIED}"
    )

    def __post_init__(self) -> None:
        """Check the options."""
        Method.__post_init__(self)
        self._require(self.epsilon > 0, f"epsilon: expected a number above 0, got {self.epsilon}")

    def site_basis(self, site: str, stats: SiteStatistics) -> SiteBasis:
        """The R directions of largest γ."""
        plus_DD = stats.of("train", site).mean_DD()
        minus_DD = stats.of("preserve", site).mean_DD()
        ridge = self.epsilon * float(minus_DD.diagonal().mean())
        self._require(
            ridge > 0, f"layer {site}: expected preserve inputs that are not all 0, got zeros"
        )
        basis_DR, gamma_R = generalised_basis(plus_DD, minus_DD, self.rank, ridge=ridge)
        return SiteBasis(
            basis_DR,
            {
                "least_gamma": float(gamma_R[-1]),
                "leakage_calibration": leakage(basis_DR, minus_DD),
            },
        )

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """A0 spans the site's basis; B0 = 0."""
        site = self._basis_of(layer, stats)
        return AdapterInit(
            site.basis_DR.T.to(layer.weight_OD).contiguous(),
            layer.weight_OD.new_zeros(layer.weight_OD.shape[0], self.rank),
            dict(site.diagnostics),
        )
