"""SC-LoRA: S = top-R eigenvectors of (1-β) E_train[h hᵀ] - β E_preserve[h hᵀ]; B0 = S, A0 = Sᵀ W.

Source: arXiv:2505.23724, Alg. 1. Deviations: moments per token and of equal trace (the authors
divide by samples and by each sample's signed maximum; `normalisation: samples` restores the former,
`tokens` leaves the traces alone); the base keeps its weights, and the adapter holds the deviation
from B0 A0. `beta: auto` is ours: per layer, the largest β at which no direction of S costs more
than it earns.
"""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from forgetless.linalg.generalised import largest_beta
from forgetless.linalg.moments import SecondMoment, augment_bias, output_energy
from forgetless.linalg.precision import full_precision
from forgetless.linalg.subspace import contrast_basis
from forgetless.methods.base import (
    LORAS_RATE,
    LOW_RATE,
    LOW_RATE_SOURCE,
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
        beta: 0 = train data only, 1 = preserve data only; `auto` = per layer, the largest at which
            all R directions still earn a reward that is not negative.
        trains: `both` (the paper) or `a` (B frozen: the output subspace stays).
        normalisation: `trace` (per token, equal traces of the output moments), `tokens`, `samples`.
        negative: `keep` directions of negative reward, as the literal top-R does, or `drop` them
            (their rows of A0 and columns of B0 are zero, so the rank falls; the best direction of a
            layer always stays).
    """

    beta: float | Literal["auto"] = 0.8
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
        self._require(
            self.beta == "auto" or (not isinstance(self.beta, str) and 0 <= self.beta <= 1),
            f"beta: expected a number in 0..1 or auto, got {self.beta!r}",
        )
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
    def default_learning_rate(self) -> float:
        """5e-5 with both trained, 2e-4 with B frozen."""
        return LOW_RATE if self.trains == "both" else 2e-4

    @property
    def learning_rate_source(self) -> str:
        """Source of the default rate."""
        if self.trains == "a":
            return LORAS_RATE
        return f"{LOW_RATE_SOURCE}; the authors use 2e-5 on 7B models at rank 128"

    @property
    def needs(self) -> frozenset[Role]:
        """Both, but at β = 0 and β = 1, where one side has no weight."""
        roles: dict[Role, bool] = {"train": self.beta != 1, "preserve": self.beta != 0}
        return frozenset(role for role, needed in roles.items() if needed)

    @property
    def bottom_roles(self) -> frozenset[Role]:
        """At β = 1 the directions are the weakest of preserve data, and nothing else."""
        return frozenset({"preserve"}) if self.beta == 1 else frozenset()

    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """B0 = S and A0 = Sᵀ W; counts how many directions earn a positive reward."""
        augmented, sides = self._normalised(layer, stats)
        beta = self._beta(augmented, sides)
        weights: dict[Role, float] = {"train": 1 - beta, "preserve": -beta}
        weighted = [weights[role] * side.moment_DD for role, side in sides.items()]
        contrast = sum(weighted[1:], weighted[0])
        scale = sum(abs(weights[role]) * side.energy for role, side in sides.items())
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
                **({"beta": beta} if self.beta == "auto" else {}),
            },
        )

    def _beta(self, augmented: Tensor, sides: Mapping[Role, _Side]) -> float:
        if isinstance(self.beta, str):
            train, preserve = sides["train"].moment_DD, sides["preserve"].moment_DD
            return largest_beta(augmented, train, preserve, self.rank)
        return float(self.beta)

    def _normalised(
        self, layer: LayerWeights, stats: SiteStatistics
    ) -> tuple[Tensor, dict[Role, _Side]]:
        """Weight and input moments with the bias appended, scaled by the normalisation rule."""
        augmented, found = layer.weight_OD, {}
        for role in sorted(self.needs, reverse=True):
            moment = stats.of(role, layer.name)
            augmented, found[role] = self._scaled(layer, moment)
        return augmented, found

    def _scaled(self, layer: LayerWeights, moment: SecondMoment) -> tuple[Tensor, _Side]:
        mean_DD, mean_D = moment.mean_DD().to(layer.weight_OD), moment.mean_D().to(layer.weight_OD)
        augmented, mean = augment_bias(layer.weight_OD, layer.bias_O, mean_DD, mean_D)
        energy = output_energy(augmented, mean)
        if self.normalisation == "samples":
            factor = moment.num_tokens / max(moment.num_samples, 1)
            return augmented, _Side(mean * factor, float(energy) * factor)
        if self.normalisation == "trace":
            unit = energy.clamp_min(torch.finfo(mean.dtype).tiny)
            return augmented, _Side(mean / unit, float(energy / unit))
        return augmented, _Side(mean, float(energy))


@dataclass(frozen=True, slots=True)
class _Side:
    """What a role's data put in.

    Attributes:
        moment_DD: Its scaled moment, with the bias appended where the layer has one.
        energy: tr(W M Wᵀ) of that moment.
    """

    moment_DD: Tensor
    energy: float
