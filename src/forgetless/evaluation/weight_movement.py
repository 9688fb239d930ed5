"""How far an adapter moves each layer, from weights and stored second moments: no data needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from peft import PeftModel

from forgetless.adapters.forms import adapted_layers, factors
from forgetless.calibration.engine import SiteMoments
from forgetless.errors import CalibrationError
from forgetless.linalg.lowrank import isometric_core
from forgetless.linalg.moments import moment_drift
from forgetless.models.targets import find_targets


@dataclass(frozen=True, slots=True)
class WeightMovement:
    """One layer.

    Attributes:
        update_norm: ‖ΔW‖_F.
        weight_norm: ‖W‖_F.
        drift: tr(ΔW M ΔWᵀ) / tr(W M Wᵀ), M the stored moment; None without one.
    """

    update_norm: float
    weight_norm: float
    drift: float | None


def measure_weights(
    model: PeftModel, moments: SiteMoments | None = None, *, adapter: str = "default"
) -> dict[str, WeightMovement]:
    """Measure every adapted linear layer below the head.

    Args:
        model: A PeftModel with a LoRA adapter of any origin.
        moments: Second moments of the same base; layers that they do not cover have no drift.
        adapter: Name of the adapter.

    Raises:
        AdapterError: No LoRA on linear layers.
        CalibrationError: The moments cover none of its layers.
    """
    targets = find_targets(model).targets
    found = {}
    for name, layer in adapted_layers(model, adapter).items():
        if name not in targets:
            continue
        core_RD = isometric_core(*factors(layer, adapter))
        weight_OD = targets[name].weight_OD()
        is_covered = moments is not None and name in moments.site_of
        found[name] = WeightMovement(
            update_norm=float(core_RD.norm()),
            weight_norm=float(weight_OD.norm()),
            drift=moment_drift(core_RD, weight_OD, moments.of(name).mean_DD())
            if moments is not None and is_covered
            else None,
        )
    if moments is not None and all(layer.drift is None for layer in found.values()):
        raise CalibrationError(
            "drift: expected second moments of the layers that the adapter changes, got none of "
            "them; give moments of a run with the same targets"
        )
    return found


def relative_update(layers: Mapping[str, WeightMovement]) -> float:
    """‖ΔW‖_F / ‖W‖_F over all layers together."""
    whole = math.hypot(*(layer.weight_norm for layer in layers.values()))
    return math.hypot(*(layer.update_norm for layer in layers.values())) / whole if whole else 0.0


def mean_drift(layers: Mapping[str, WeightMovement]) -> float | None:
    """Plain mean over the layers that have one, as in a record."""
    drifts = [layer.drift for layer in layers.values() if layer.drift is not None]
    return sum(drifts) / len(drifts) if drifts else None
