"""drift: λ Σ tr(ΔW M ΔWᵀ) / tr(W M Wᵀ), M a preserve second moment of the base.

Weight decay in the metric of preserve activations: directions that preserve data do not use are
free. No forward pass of its own; O(R D²) a layer and step. The moments stay in memory while it
trains, once per site; where A is frozen, R × R of each layer.

Source: this project.
"""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank of ΔW's
# factors.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from forgetless.adapters.forms import adapted_layers, form_of, live_factors
from forgetless.linalg.moments import output_energy
from forgetless.linalg.precision import full_precision
from forgetless.models.targets import find_targets
from forgetless.training.regularisers.base import Binding, MicroBatch, Regulariser, Term


@dataclass(frozen=True, kw_only=True)
class Drift(Regulariser):
    """Drift penalty.

    Attributes:
        weight: λ.
    """

    weight: float = 5.0

    name: ClassVar[str] = "drift"
    title: ClassVar[str] = "weight decay in the metric of preserve activations"
    paper: ClassVar[str] = "this project"
    needs_moments: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        self._require_positive(weight=self.weight)

    def bind(self, to: Binding) -> Term:
        """Divide each site's moment by the base's own output energy, layer by layer."""
        moments, targets = self._moments(to), find_targets(to.model).targets
        a_is_frozen = form_of(to.model, to.adapter).name == "b"
        means: dict[str, Tensor] = {}
        energies: list[Callable[[], Tensor]] = []
        for name, layer in adapted_layers(to.model, to.adapter).items():
            site = moments.site_of[name]
            weight_OD = targets[name].weight_OD()
            if site not in means:
                means[site] = moments.moments[site].mean_DD().to(weight_OD)
            moment_DD = means[site].to(weight_OD.device)
            kept = float(output_energy(weight_OD, moment_DD))
            factor = self.weight / kept if kept > 0 else 0.0
            energies.append(_energy(layer, to.adapter, moment_DD, factor, a_is_frozen))
        return _DriftTerm(energies)


def _energy(
    layer: LoraLayer, adapter: str, moment_DD: Tensor, factor: float, a_is_frozen: bool
) -> Callable[[], Tensor]:
    """The `factor` of tr(B (A M Aᵀ) Bᵀ), times that, as a function of the live factors."""
    if a_is_frozen:
        a_RD = live_factors(layer, adapter)[0].detach()
        with full_precision():
            return _energy_of_b(layer, adapter, a_RD @ moment_DD.to(a_RD) @ a_RD.T * factor)

    def energy() -> Tensor:
        a_RD, b_OR = live_factors(layer, adapter)
        return ((b_OR.T @ b_OR) * (a_RD @ moment_DD.to(a_RD) @ a_RD.T)).sum() * factor

    return energy


def _energy_of_b(layer: LoraLayer, adapter: str, inner_RR: Tensor) -> Callable[[], Tensor]:
    """tr(B inner Bᵀ); no D-wide tensor is kept."""

    def energy() -> Tensor:
        b_OR = live_factors(layer, adapter)[1]
        return ((b_OR.T @ b_OR) * inner_RR).sum()

    return energy


class _DriftTerm(Term):
    def __init__(self, energies: list[Callable[[], Tensor]]) -> None:
        self._energies = energies

    def loss(self, model: nn.Module, micro: MicroBatch) -> Tensor | None:
        """Of the weights alone, so once a step."""
        if micro.index:
            return None
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False), full_precision():
            values = [energy().to(device) for energy in self._energies]
        return torch.stack(values).sum()
