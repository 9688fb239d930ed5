"""EVA: A0 = the R directions of largest variance of train inputs, B0 = 0; both train.

Source: arXiv:2410.07170, Sec. 3. Deviations: exact eigenvectors of all tokens in place of an
incremental SVD that stops at convergence; every layer has the same rank (the paper redistributes a
budget by explained variance: its rho = 1 is ours). `centred` takes the mean out, as the authors'
incremental PCA does; without it these are the right singular vectors of the inputs.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forgetless.linalg.subspace import top_basis
from forgetless.methods.base import (
    AdapterInit,
    LayerWeights,
    Method,
    Role,
    SiteBasis,
    SiteStatistics,
    Trains,
)

_BIBTEX = """\
@misc{paischer2024eva,
  title = {Parameter Efficient Fine-tuning via Explained Variance Adaptation},
  author = {Paischer, Fabian and Hauzenberger, Lukas and Schmied, Thomas and Alkin, Benedikt and
            Deisenroth, Marc Peter and Hochreiter, Sepp},
  year = {2024},
  eprint = {2410.07170},
  archivePrefix = {arXiv},
  note = {First version: One Initialization to Rule them All}
}"""


@dataclass(frozen=True, kw_only=True)
class EVA(Method):
    """EVA.

    Attributes:
        centred: Whether directions are of variance about the mean, or of energy about 0.
    """

    centred: bool = True

    name: ClassVar[str] = "eva"
    title: ClassVar[str] = "A starts where train activations vary most"
    paper: ClassVar[str] = "EVA, arXiv:2410.07170"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = "none on preserve data; it learns fast on train data"
    usual_form: ClassVar[Trains] = "plain"
    usual_needs: ClassVar[frozenset[Role]] = frozenset({"train"})

    def site_basis(self, site: str, stats: SiteStatistics) -> SiteBasis:
        """The R directions of most variance, and the share of it that they hold."""
        moment = stats.of("train", site)
        moment_DD = moment.mean_DD()
        if self.centred:
            mean_D = moment.mean_D()
            moment_DD = moment_DD - mean_D[:, None] * mean_D
        basis_DR, values_R = top_basis(moment_DD, self.rank)
        total = float(moment_DD.diagonal().sum())
        share = float(values_R.sum()) / total if total > 0 else 0.0
        return SiteBasis(basis_DR, {"explained_variance": share})

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """A0 = Uᵀ; B0 = 0."""
        site = self._basis_of(layer, stats)
        return AdapterInit(
            site.basis_DR.T.to(layer.weight_OD).contiguous(),
            layer.weight_OD.new_zeros(layer.weight_OD.shape[0], self.rank),
            dict(site.diagnostics),
        )
