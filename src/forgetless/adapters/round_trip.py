"""Whether what was written is the live adapter: reload it, compare every update, and the logits.

Logits alone could not tell: an update may move them by less than rounding does.
"""

# Shape letters in this file: B = rows, T = positions, D = layer input width, O = output width.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.load import load_adapter, removal
from forgetless.adapters.scale import scaled_adapter
from forgetless.errors import AdapterError
from forgetless.linalg.lowrank import distance
from forgetless.linalg.precision import full_precision
from forgetless.models.state import left_as_found
from forgetless.models.targets import base_of

PROBE = "forgetless-roundtrip"
PROBE_TEXT = "The quick brown fox jumps over the lazy dog."
# Largest difference of logits, as a share of the largest logit, that rounding may explain.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_16_BIT = 5e-2
TOLERANCE_UPDATE = 1e-4  # of a layer's ‖ΔW‖: exports are float32


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """What was written, reloaded, against the live adapter on the same base.

    Attributes:
        max_difference: Largest absolute difference of logits.
        max_logit: Largest absolute logit, for scale.
        max_update_error: Largest ‖ΔW − ΔW'‖ / ‖ΔW‖ of a layer, ΔW' as it was written.
    """

    max_difference: float
    max_logit: float
    max_update_error: float


def check_round_trip(
    model: PeftModel,
    folder: Path | str,
    input_ids_BT: Tensor,
    *,
    scale: float = 1.0,
    adapter: str = "default",
    shown: Path | str | None = None,
) -> RoundTrip:
    """Reload an exported adapter beside the live one; compare updates, and logits on one input.

    The model is left as it was found. Messages call the folder `shown`.

    Raises:
        AdapterError: A layer's update or the logits differ by more than rounding explains.
    """
    where = f"export: {folder if shown is None else shown}"
    inputs = _inputs(model, input_ids_BT)
    with left_as_found(model), torch.no_grad():
        model.eval()
        model.set_adapter(adapter)
        with scaled_adapter(model, scale, adapter):
            live = model(**inputs).logits
            remove = removal(model, PROBE)  # an export may wrap more layers than the live one
            load_adapter(model, folder, adapter=PROBE)
            try:
                worst = _compare_updates(model, adapter, where)
                exported = model(**inputs).logits
            finally:
                model.set_adapter(adapter)  # PEFT warns of deleting the active one
                remove()
    difference, largest = _compare_logits(live, exported, _coarsest_dtype(base_of(model)), where)
    return RoundTrip(difference, largest, worst)


def check_merged(
    model: PeftModel,
    merged: PreTrainedModel,
    input_ids_BT: Tensor,
    *,
    scale: float = 1.0,
    adapter: str = "default",
) -> RoundTrip:
    """Compare a merged model, reloaded in the dtype that it was written in, with the live adapter.

    Every weight must be W + scale·ΔW, rounded once. How much of ΔW that rounding took is told, not
    judged: in bfloat16 it can be a large part of a small update.

    Raises:
        AdapterError: A weight or the logits differ by more than rounding explains.
    """
    where = f"merge: {merged.config.name_or_path}"
    worst = 0.0
    for name, layer in adapted_layers(model, adapter).items():
        a_RD, b_OR = factors(layer, adapter)
        base_layer = layer.get_base_layer()
        with full_precision():
            delta = (b_OR @ a_RD) * scale
        delta = delta.T if isinstance(base_layer, Conv1D) else delta
        weight = base_layer.weight.detach().to(delta.dtype)
        written = merged.get_submodule(name).weight.detach()
        kind = torch.finfo(written.dtype)
        # Below the smallest normal number, as float16 has it at 6e-5, the spacing stays the same.
        spacing = kind.eps * (weight + delta).abs().clamp_min(kind.smallest_normal)
        found = written.to(delta)
        if not bool(((found - weight - delta).abs() <= spacing + 1e-12).all()):
            raise AdapterError(
                f"{where}: expected W + ΔW rounded once at layer {name}, got other weights; do not "
                "use it, and report this"
            )
        worst = max(worst, _share((found - weight - delta).norm(), delta.norm()))
    inputs = _inputs(model, input_ids_BT)
    with left_as_found(model), torch.no_grad():
        model.eval()
        model.set_adapter(adapter)
        with scaled_adapter(model, scale, adapter):
            live = model(**inputs).logits
        reloaded = merged(**inputs).logits
    coarsest = min(_coarsest_dtype(base_of(model)), merged.dtype, key=lambda dtype: dtype.itemsize)
    difference, largest = _compare_logits(live, reloaded, coarsest, where)
    return RoundTrip(difference, largest, worst)


def _inputs(model: PeftModel, input_ids_BT: Tensor) -> dict[str, Any]:
    """The same tokens for an encoder and its decoder, where there are two."""
    inputs: dict[str, Any] = {"input_ids": input_ids_BT, "use_cache": False}
    if base_of(model).config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids_BT
    return inputs


def _compare_updates(model: PeftModel, adapter: str, where: str) -> float:
    """Largest relative error of a layer's update in the adapter PROBE."""
    live, written = adapted_layers(model, adapter), adapted_layers(model, PROBE)
    missing = sorted(live.keys() - written.keys())
    if missing:
        raise AdapterError(f"{where}: expected the layers of the live adapter, lacks {missing[0]}")
    for name in written.keys() - live.keys():  # filled in for an engine
        a_RD, b_OR = factors(written[name], PROBE)
        if bool(a_RD.any()) or bool(b_OR.any()):
            raise AdapterError(f"{where}: expected zeros at layer {name}, got an update")
    worst = 0.0
    for name, layer in live.items():
        apart, size = distance(factors(layer, adapter), factors(written[name], PROBE))
        error = _share(apart, size)
        if not error <= TOLERANCE_UPDATE:  # NaN must not pass
            raise AdapterError(
                f"{where}: expected the live adapter's update at layer {name}, got one that is "
                f"{error:.2e} of its norm away; do not use it, and report this"
            )
        worst = max(worst, error)
    return worst


def _compare_logits(
    live: Tensor, found: Tensor, dtype: torch.dtype, where: str
) -> tuple[float, float]:
    """Largest difference and largest logit; `dtype` is the coarsest that either was computed in."""
    difference = float((live.float() - found.float()).abs().max())
    largest = float(live.float().abs().max())
    share = TOLERANCE_16_BIT if dtype.itemsize < 4 else TOLERANCE_FLOAT32
    if not difference <= share * largest:  # NaN must not pass
        raise AdapterError(
            f"{where}: expected the logits of the live adapter up to {share * largest:.2e}, "
            f"got a difference of {difference:.2e}; do not use it, and report this"
        )
    return difference, largest


def _coarsest_dtype(base: PreTrainedModel) -> torch.dtype:
    """Of all parameters: that of quantised weights where there are some."""
    return min((p.dtype for p in base.parameters()), key=lambda dtype: dtype.itemsize)


def _share(part: Tensor, whole: Tensor) -> float:
    """Part / whole; 0 where both are 0."""
    return 0.0 if float(part) == 0.0 else float(part) / max(float(whole), 1e-300)
