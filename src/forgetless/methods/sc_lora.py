"""SC-LoRA: S = top-R eigenvectors of (1-β) E_train[h hᵀ] - β E_preserve[h hᵀ]; B0 = S, A0 = Sᵀ W.

Source: arXiv:2505.23724, Alg. 1. Deviations: moments per token and of equal trace (the authors
divide by samples and by each sample's signed maximum; `normalisation: samples` restores the former,
`tokens` leaves the traces alone); the base keeps its weights, and the adapter holds the deviation
from B0 A0.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from forgetless.linalg.moments import SecondMoment, augment_bias, output_energy
from forgetless.linalg.precision import full_precision
from forgetless.linalg.subspace import contrast_basis
from forgetless.methods.base import (
    LORAS_RATE,
    AdapterInit,
    LayerWeights,
    Method,
    Role,
    SiteStatistics,
    Trains,
)

Normalisation = Literal["trace", "tokens", "samples"]


_BIBTEX = """\
@misc{luo2025sclora,
  title = {{SC-LoRA}: Balancing Efficient Fine-tuning and Knowledge Preservation via
           Subspace-Constrained {LoRA}},
  author = {Luo, Minrui and Kuang, Fuhang and Wang, Yu and Liu, Zirui and He, Tianxing},
  year = {2025},
  eprint = {2505.23724},
  archivePrefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class SCLoRA(Method):
    """SC-LoRA.

    Attributes:
        beta: 0 = train data only, 1 = preserve data only.
        trains: `both` (the paper) or `a` (B frozen: the output subspace stays).
        normalisation: `trace` (per token, equal traces of the output moments), `tokens`, `samples`.
        negative: `keep` directions of negative reward, as the literal top-R does, or `drop` them
            (their rows of A0 and columns of B0 are zero, so the rank falls; the best direction of a
            layer always stays).
    """

    beta: float = 0.8
    trains: Literal["both", "a"] = "both"
    normalisation: Normalisation = "trace"
    negative: Literal["keep", "drop"] = "keep"

    name: ClassVar[str] = "sc-lora"
    title: ClassVar[str] = "output confined to where train data are strong and preserve data weak"
    paper: ClassVar[str] = "SC-LoRA, arXiv:2505.23724"
    bibtex: ClassVar[tuple[str, ...]] = (_BIBTEX,)
    promise: ClassVar[str] = (
        "starts where a change costs preserve data least; bounds nothing afterwards (trains: a "
        "keeps the output subspace)"
    )

    def __post_init__(self) -> None:
        """Check the options."""
        Method.__post_init__(self)
        self._require(0 <= self.beta <= 1, f"beta: expected a number in 0..1, got {self.beta}")
        for key, value, known in (
            ("trains", self.trains, ("both", "a")),
            ("normalisation", self.normalisation, ("trace", "tokens", "samples")),
            ("negative", self.negative, ("keep", "drop")),
        ):
            self._require(value in known, f"{key}: expected {' or '.join(known)}, got {value!r}")

    @property
    def form(self) -> Trains:
        """`both` or `a`."""
        return self.trains

    @property
    def needs(self) -> frozenset[Role]:
        """Both, but at β = 0 and β = 1, where one side has no weight."""
        roles: set[Role] = set()
        if self.beta < 1:
            roles.add("train")
        if self.beta > 0:
            roles.add("preserve")
        return frozenset(roles)

    @property
    def bottom_roles(self) -> frozenset[Role]:
        """At β = 1 the directions are the weakest of preserve data, and nothing else."""
        return frozenset({"preserve"}) if self.beta == 1 else frozenset()

    @property
    def default_learning_rate(self) -> float:
        """2e-4."""
        return 2e-4

    @property
    def learning_rate_source(self) -> str:
        """Source of the default rate."""
        return LORAS_RATE

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """B0 = S and A0 = Sᵀ W; counts how many directions earn a positive reward."""
        contrast: Tensor | None = None
        scale = 0.0
        augmented = layer.weight_OD
        sides: tuple[tuple[Role, float], ...] = (
            ("train", 1 - self.beta),
            ("preserve", -self.beta),
        )
        for role, weight in sides:
            if weight == 0:
                continue
            augmented, moment = self._normalised(layer, stats.of(role, layer.name))
            contrast = weight * moment if contrast is None else contrast + weight * moment
            scale += abs(weight) * float(output_energy(augmented, moment))
        assert contrast is not None  # beta cannot be 0 and 1
        found = contrast_basis(augmented, contrast, self.rank, scale=scale)
        with full_precision():
            a_RD, b_OR = found.basis_OR.T @ layer.weight_OD, found.basis_OR
        if self.negative == "drop":
            kept_R = found.eigenvalues_R >= -found.tolerance
            kept_R[0] = True  # a layer without any direction would train nothing
            a_RD, b_OR = a_RD * kept_R[:, None], b_OR * kept_R
        positive, negative = found.num_positive, found.num_negative
        return AdapterInit(
            a_RD.contiguous(),
            b_OR.contiguous(),
            {
                "positive_directions": positive,
                "zero_directions": self.rank - positive - negative,
                "negative_directions": negative,
            },
        )

    def _normalised(self, layer: LayerWeights, moment: SecondMoment) -> tuple[Tensor, Tensor]:
        """Weight and input moment with the bias appended, scaled by the normalisation rule."""
        mean_DD, mean_D = moment.mean_DD().to(layer.weight_OD), moment.mean_D().to(layer.weight_OD)
        augmented, mean = augment_bias(layer.weight_OD, layer.bias_O, mean_DD, mean_D)
        if self.normalisation == "samples":
            return augmented, mean * (moment.num_tokens / max(moment.num_samples, 1))
        if self.normalisation == "trace":
            energy = output_energy(augmented, mean)
            return augmented, mean / energy.clamp_min(torch.finfo(mean.dtype).tiny)
        return augmented, mean
