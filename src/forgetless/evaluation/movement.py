"""How far an adapter moves each layer: update size F_Δ, drift, leakage, relative norm.

One forward pass of the base over held-out rows, without the output head. With B = Q T (thin QR) the
small matrix C = T A has ‖C x‖ = ‖ΔW x‖, so no O-wide product is formed; tr(ΔW M ΔWᵀ) = mean ‖C x‖²
and tr(W M Wᵀ) = mean ‖W x‖², read off the layer's own output, so no D x D moment is held either.

Source of F_Δ: CLoRA, arXiv:2410.16801, Eq. 3.
"""

# Shape letters in this file: B = rows of a batch, T = positions, N = kept tokens of a batch,
# D = layer input width, O = layer output width, R = rank, P = numerical rank of A.

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from forgetless.adapters.forms import adapted_layers, down_projection, factors, freezes_a
from forgetless.calibration.engine import SiteMoments
from forgetless.calibration.hooks import base_forward
from forgetless.data.rows import RowSet
from forgetless.data.tokens import Batch, make_batches, pad_token_id, tokenize
from forgetless.errors import AdapterError, CalibrationError, ForgetlessWarning
from forgetless.evaluation.dense_updates import dense_updates
from forgetless.evaluation.results import LayerMovement, Movement
from forgetless.evaluation.selection import model_inputs
from forgetless.linalg.lowrank import isometric_core, row_space
from forgetless.linalg.moments import drift_bound, moment_drift
from forgetless.models.pair import TunedModel, TunedPair, reference_of
from forgetless.models.placement import input_device
from forgetless.models.targets import Target, base_of, find_targets

_BATCH_SIZE = 8


def measure_movement(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    row_sets: Sequence[RowSet],
    *,
    adapter: str,
    calibration_moments: SiteMoments | None = None,
    progress: Callable[[int], None] | None = None,
) -> Movement:
    """Measure every adapted layer on held-out rows.

    Args:
        model: A PeftModel with a LoRA adapter of any origin, or a tuned pair.
        tokenizer: Tokenises the rows.
        row_sets: Held-out preserve rows; each set's `tokens` says which tokens count.
        adapter: Name of the adapter; a pair has none.
        calibration_moments: Moments that the adapter was calibrated with, for drift beside the
            held-out one.
        progress: Called with the number of rows of each finished batch.

    Returns:
        Each layer's figures and their plain means over layers.

    Raises:
        AdapterError: Not a LoRA on linear layers.
        CalibrationError: No token to measure on, or NaN or inf in an activation.
    """
    probes = _probes(model, adapter)
    reference = reference_of(model)
    with base_forward(reference) as decoder, ExitStack() as stack:
        device = input_device(base_of(reference))
        for probe in probes.values():
            stack.callback(probe.target.module.register_forward_hook(probe.observe).remove)
        for batch in _batches(row_sets, tokenizer):
            inputs = model_inputs(batch.input_ids_BT, batch.attention_mask_BT, device)
            for probe in probes.values():
                probe.kept_BT = batch.kept_BT.bool()
            decoder(**inputs)
            if progress is not None:
                progress(len(batch.index))
    layers = {
        name: probe.result(*_on_calibration(probe, calibration_moments))
        for name, probe in probes.items()
    }
    return _overall(layers)


@dataclass(slots=True)
class _LayerProbe:
    """Sums over tokens at one layer.

    Attributes:
        target: The base layer.
        core_RD: C, with ‖C x‖ = ‖ΔW x‖.
        basis_DP: U, orthonormal basis of the row space of A; of ΔW in a tuned pair.
        a_is_frozen: Whether that row space stays while training.
        kept_BT: Which tokens of the current batch count.
        sums: Of ‖ΔW x‖/‖x‖, ‖ΔW x‖², ‖W x‖², ‖Uᵀ x‖² and ‖x‖².
        num_tokens: Tokens summed.
    """

    target: Target
    core_RD: Tensor
    basis_DP: Tensor
    a_is_frozen: bool
    kept_BT: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    sums: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))
    num_tokens: int = 0

    def observe(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook of the base layer."""
        name = self.target.name
        # Routers see (B·T, D), all other layers (B, T, D).
        flat, flat_output = args[0].flatten(0, -2), output.flatten(0, -2)
        if flat.shape[0] != self.kept_BT.numel():
            raise CalibrationError(
                f"movement: layer {name} sees {flat.shape[0]} of {self.kept_BT.numel()} tokens "
                "(a routed expert?); pass movement_data=() to leave movement out"
            )
        kept = self.kept_BT.reshape(-1).to(flat.device)
        x_ND = flat[kept].to(self.core_RD)
        output_NO = flat_output[kept].to(self.core_RD)
        bias_O = self.target.bias_O()
        if bias_O is not None:
            output_NO = output_NO - bias_O.to(output_NO)
        size_N = x_ND.norm(dim=1)
        moved_N = (x_ND @ self.core_RD.T).norm(dim=1)
        # A token whose input is exactly 0 is not moved.
        ratio_N = torch.where(size_N > 0, moved_N / size_N, torch.zeros_like(size_N))
        inside_NP = x_ND @ self.basis_DP
        sums = [ratio_N, moved_N**2, output_NO**2, inside_NP**2, size_N**2]
        self.sums += torch.stack([part.sum(dtype=torch.float64) for part in sums]).cpu()
        self.num_tokens += x_ND.shape[0]

    def result(self, drift_calibration: float | None, drift_bound: float | None) -> LayerMovement:
        """Figures of the layer."""
        name = self.target.name
        if self.num_tokens == 0:
            raise CalibrationError(
                f"movement: expected held-out tokens at layer {name}, got none; "
                "give movement_data with rows"
            )
        if not bool(self.sums.isfinite().all()):
            raise CalibrationError(
                f"movement: expected finite activations and weights at layer {name}, got NaN "
                "or inf; load the model in float32 or bfloat16, or train with a lower learning rate"
            )
        ratio, moved, kept, inside, energy = self.sums.tolist()
        weight_OD = self.target.weight_OD()
        return LayerMovement(
            update_size=ratio / self.num_tokens,
            drift=_ratio(moved, kept),
            drift_calibration=drift_calibration,
            drift_bound=drift_bound,
            leakage=self._leakage(inside, energy),
            relative_norm=_ratio(float(self.core_RD.norm()), float(weight_OD.norm())),
        )

    def _leakage(self, inside: float, energy: float) -> float | None:
        D, P = self.basis_DP.shape
        if P:
            return _ratio(inside, energy) * D / P
        return None if bool(self.core_RD.any()) else 0.0


def _probes(model: TunedModel, adapter: str) -> dict[str, _LayerProbe]:
    if isinstance(model, TunedPair):
        return {
            name: _LayerProbe(update.target, update.core_RD, update.basis_DP, a_is_frozen=False)
            for name, update in dense_updates(model).items()
        }
    return _adapter_probes(model, adapter)


def _adapter_probes(model: PeftModel, adapter: str) -> dict[str, _LayerProbe]:
    layers = adapted_layers(model, adapter)
    targets = find_targets(model).targets
    for name in layers.keys() - targets.keys():
        warnings.warn(
            f"movement: layer {name} is adapted but is no linear layer below the head; "
            "it is not measured",
            ForgetlessWarning,
            stacklevel=3,
        )
    extra = model.peft_config[adapter].modules_to_save
    if extra:
        warnings.warn(
            f"movement: {', '.join(extra)} were trained in full beside the adapter; "
            "they are not measured",
            ForgetlessWarning,
            stacklevel=3,
        )
    probes: dict[str, _LayerProbe] = {}
    for name, layer in layers.items():
        if name in targets:
            a_RD, b_OR = factors(layer, adapter)
            basis_DP = row_space(down_projection(layer, adapter))
            core_RD = isometric_core(a_RD, b_OR)
            frozen = freezes_a(layer, adapter)
            probes[name] = _LayerProbe(targets[name], core_RD, basis_DP, frozen)
    if not probes:
        raise AdapterError(
            f"movement: expected a LoRA on linear layers, got adapter {adapter!r} with none; "
            f"pass movement_data=() to leave movement out"
        )
    return probes


def _batches(row_sets: Sequence[RowSet], tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    return [
        batch
        for row_set in row_sets
        for batch in make_batches(
            tokenize(row_set, tokenizer),
            batch_size=_BATCH_SIZE,
            pad_token_id=pad_token_id(tokenizer),
            tokens=row_set.spec.tokens,
        )
    ]


def _on_calibration(
    probe: _LayerProbe, moments: SiteMoments | None
) -> tuple[float | None, float | None]:
    """Drift on the calibration moment, and its bound."""
    if moments is None or probe.target.name not in moments.site_of:
        return None, None
    moment_DD, weight_OD = moments.of(probe.target.name).mean_DD(), probe.target.weight_OD()
    drift = moment_drift(probe.core_RD, weight_OD, moment_DD)
    if not probe.a_is_frozen:
        return drift, None
    return drift, drift_bound(probe.core_RD, weight_OD, moment_DD, probe.basis_DP)


def _ratio(part: float, whole: float) -> float:
    """Part / whole; 0 where both are 0."""
    return part / whole if whole else 0.0


def _overall(layers: Mapping[str, LayerMovement]) -> Movement:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    calibrated = [v.drift_calibration for v in layers.values() if v.drift_calibration is not None]
    bounds = [v.drift_bound for v in layers.values() if v.drift_bound is not None]
    leaks = [v.leakage for v in layers.values() if v.leakage is not None]
    return Movement(
        update_size=mean([v.update_size for v in layers.values()]),
        drift=mean([v.drift for v in layers.values()]),
        drift_calibration=mean(calibrated) if calibrated else None,
        drift_bound=mean(bounds) if bounds else None,
        leakage=mean(leaks) if leaks else None,
        relative_norm=mean([v.relative_norm for v in layers.values()]),
        layers=dict(layers),
    )
