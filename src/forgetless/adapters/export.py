"""Export a plain LoRA adapter that every engine serves, or a merged model; check the round trip."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.load import WEIGHTS, load_adapter
from forgetless.adapters.scale import scaled_adapter
from forgetless.errors import AdapterError
from forgetless.models.targets import base_of, module_suffixes

PROBE = "forgetless-roundtrip"


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Logits of the exported adapter, reloaded by PEFT, against the live one on the same base.

    Attributes:
        max_difference: Largest absolute difference of logits.
        max_logit: Largest absolute logit, for scale.
    """

    max_difference: float
    max_logit: float


def export(
    model: PeftModel,
    folder: Path | str,
    *,
    scale: float = 1.0,
    adapter: str = "default",
    base_name: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write a plain LoRA adapter: one rank, alpha = rank, no patterns, loadable with peft alone.

    Args:
        model: A PeftModel with any of our forms, or any PEFT LoRA on linear layers.
        folder: Where to write; made where it does not exist.
        scale: Factor on ΔW.
        adapter: Which adapter.
        base_name: Base model id to record; that of the model where none is given.
        revision: Its revision.

    Returns:
        The folder.

    Raises:
        AdapterError: No such adapter, or tensors that a plain LoRA cannot hold.
    """
    folder = Path(folder)
    layers = adapted_layers(model, adapter)
    base = base_of(model)
    found = {name: factors(layer, adapter) for name, layer in layers.items()}
    rank = max(a_RD.shape[0] for a_RD, _ in found.values())
    tensors: dict[str, Tensor] = {}
    for name, (a_RD, b_OR) in found.items():
        padding = rank - a_RD.shape[0]  # zero rows: engines want one rank
        a_RD = nn.functional.pad(a_RD, (0, 0, 0, padding))
        b_OR = nn.functional.pad(b_OR * scale, (0, padding))
        if not (a_RD.isfinite().all() and b_OR.isfinite().all()):
            raise AdapterError(f"export: layer {name} holds NaN or inf; nothing was written")
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = a_RD.float().cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = b_OR.float().cpu().contiguous()
    live = model.peft_config[adapter]
    config = LoraConfig(
        task_type=live.task_type,
        base_model_name_or_path=base_name or base.config.name_or_path or None,
        revision=revision,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=module_suffixes(base, list(found)),
        init_lora_weights=True,
        fan_in_fan_out=all(isinstance(x.get_base_layer(), Conv1D) for x in layers.values()),
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS}.part"
    save_file(tensors, part, {"format": "pt"})
    config.save_pretrained(str(folder))
    part.replace(folder / WEIGHTS)
    return folder


def check_round_trip(
    model: PeftModel,
    folder: Path | str,
    input_ids_BT: Tensor,
    *,
    scale: float = 1.0,
    adapter: str = "default",
) -> RoundTrip:
    """Reload an export beside the live adapter and compare logits on the same input."""
    was_training = model.training
    model.eval()
    active = model.active_adapters
    try:
        with torch.no_grad():
            model.set_adapter(adapter)
            with scaled_adapter(model, scale, adapter):
                live = model(input_ids=input_ids_BT, use_cache=False).logits.float()
            load_adapter(model, folder, adapter=PROBE)
            exported = model(input_ids=input_ids_BT, use_cache=False).logits.float()
    finally:
        model.set_adapter(active[0])
        if PROBE in model.peft_config:
            model.delete_adapter(PROBE)
        model.train(was_training)
    return RoundTrip(float((live - exported).abs().max()), float(live.abs().max()))


def save_merged(
    model: PeftModel, folder: Path | str, *, scale: float = 1.0, adapter: str = "default"
) -> Path:
    """Write the base with W + scale·ΔW, rounded once to the base's dtype; biases and all else kept.

    The live model is not changed.
    """
    folder = Path(folder)
    base = base_of(model)
    layers = adapted_layers(model, adapter)
    state: dict[str, Tensor] = {}
    for key, tensor in base.state_dict(keep_vars=False).items():
        if ".lora_" in key:
            continue
        state[key.replace(".base_layer.", ".")] = tensor
    for name, layer in layers.items():
        if not layer.get_base_layer().weight.is_floating_point():
            raise AdapterError(
                f"merge: layer {name} is quantised; load the base unquantised and merge there"
            )
        a_RD, b_OR = factors(layer, adapter)
        delta_OD = (b_OR @ a_RD) * scale
        if isinstance(layer.get_base_layer(), Conv1D):
            delta_OD = delta_OD.T
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (
            (weight.to(delta_OD.dtype) + delta_OD).to(weight.dtype).contiguous()
        )
    base.save_pretrained(str(folder), state_dict=state)
    return folder
