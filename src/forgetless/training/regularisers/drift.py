"""drift: λ Σ tr(ΔW M ΔWᵀ) / tr(W M Wᵀ), M a preserve second moment of the base.

Weight decay in the metric of preserve activations: directions that preserve data do not use are
free. No forward pass of its own; O(R D²) a layer and step, O(O D²) where every weight trains. The
moments stay in memory while it trains, once per site; where A is frozen, R × R of each layer.

Source: this project.
"""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank of ΔW's
# factors.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.forms import adapted_layers, form_of, live_factors
from forgetless.linalg.moments import output_energy
from forgetless.linalg.precision import full_precision
from forgetless.models.pair import TunedPair, reference_of
from forgetless.models.placement import Sharding
from forgetless.models.targets import Target, find_targets
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
    sharded_by: ClassVar[frozenset[Sharding]] = frozenset({"FSDP"})

    def __post_init__(self) -> None:
        """Check the options."""
        self._require_positive(weight=self.weight)

    def bind(self, to: Binding) -> Term:
        """Divide each site's moment by the base's own output energy, layer by layer."""
        moments, targets = self._moments(to), find_targets(reference_of(to.model)).targets
        means: dict[str, Tensor] = {}
        energies: list[Callable[[], Tensor]] = []
        for name, energy_in in _energies(to).items():
            site = moments.site_of[name]
            weight_OD = targets[name].weight_OD()
            if site not in means:
                means[site] = moments.moments[site].mean_DD().to(weight_OD)
            moment_DD = means[site].to(weight_OD.device)
            kept = float(output_energy(weight_OD, moment_DD))
            factor = self.weight / kept if kept > 0 else 0.0
            energies.append(energy_in(moment_DD, factor))
        return _DriftTerm(energies)


# From a moment and a factor to the factor of tr(ΔW M ΔWᵀ), as a function of what trains now.
_EnergyIn = Callable[[Tensor, float], Callable[[], Tensor]]


def _energies(to: Binding) -> dict[str, _EnergyIn]:
    """By layer."""
    if isinstance(to.model, TunedPair):
        base, tuned = (find_targets(m).targets for m in (to.model.base, to.model.tuned))
        return {name: partial(_dense_energy, base[name], tuned[name]) for name in base}
    a_is_frozen = form_of(to.model, to.adapter).name == "b"
    return {
        name: partial(_energy, layer, to.adapter, a_is_frozen)
        for name, layer in adapted_layers(to.model, to.adapter).items()
    }


def _dense_energy(
    base: Target, tuned: Target, moment_DD: Tensor, factor: float
) -> Callable[[], Tensor]:
    """tr(ΔW M ΔWᵀ) of a whole update, times `factor`."""
    module, is_transposed = tuned.module, isinstance(tuned.module, Conv1D)

    def energy() -> Tensor:
        weight = module.get_parameter("weight")
        live_OD = weight.T if is_transposed else weight
        delta_OD = live_OD - base.weight_OD()
        return ((delta_OD @ moment_DD.to(delta_OD)) * delta_OD).sum() * factor

    return energy


def _energy(
    layer: LoraLayer, adapter: str, a_is_frozen: bool, moment_DD: Tensor, factor: float
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
