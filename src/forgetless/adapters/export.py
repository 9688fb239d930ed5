"""Export a plain LoRA adapter that every engine serves, or a merged model."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.base_identity import base_metadata
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.load import CONFIG, WEIGHTS
from forgetless.adapters.plain_lora import refuse_what_plain_lora_cannot_hold
from forgetless.errors import AdapterError
from forgetless.linalg.precision import full_precision
from forgetless.models.load import base_reference
from forgetless.models.targets import base_of, module_suffixes


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
    refuse_what_plain_lora_cannot_hold(model, adapter)
    layers = adapted_layers(model, adapter)
    base = base_of(model)
    tensors, rank = _plain_tensors(layers, adapter, scale)
    name = base_name or base.config.name_or_path
    config = LoraConfig(
        task_type=model.peft_config[adapter].task_type,
        base_model_name_or_path=base_reference(name) if name else None,
        revision=revision,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=module_suffixes(base, list(layers)),
        init_lora_weights=True,
        fan_in_fan_out=all(isinstance(x.get_base_layer(), Conv1D) for x in layers.values()),
        inference_mode=True,
    )
    with _written_into(folder) as workplace:
        save_file(tensors, workplace / WEIGHTS, {"format": "pt", **base_metadata(base)})
        config.save_pretrained(str(workplace))
        for file in (WEIGHTS, CONFIG):
            (workplace / file).replace(folder / file)
    return folder


def _plain_tensors(
    layers: dict[str, LoraLayer], adapter: str, scale: float
) -> tuple[dict[str, Tensor], int]:
    """A and B of every layer under PEFT's names, padded with zeros to the one rank given back."""
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
    return tensors, rank


@contextmanager
def _written_into(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to write into and rename out of; gone afterwards, come what may."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as workplace:
            yield Path(workplace)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"export: could not write {folder} ({str(error).strip()}); free some space, or choose "
            "another folder"
        ) from error


def save_merged(
    model: PeftModel,
    folder: Path | str,
    *,
    scale: float = 1.0,
    adapter: str = "default",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the base with W + scale·ΔW, rounded once; biases and all else kept.

    The live model is not changed.

    Args:
        model: A PeftModel with any of our forms, or any PEFT LoRA on linear layers.
        folder: Where to write.
        scale: Factor on ΔW.
        adapter: Which adapter.
        dtype: Of the weights written; the base's own by default.

    Raises:
        AdapterError: A quantised base, an adapter that is more than plain LoRA, or a folder or
            configuration that cannot be written.
    """
    folder = Path(folder)
    refuse_what_plain_lora_cannot_hold(model, adapter)
    base = base_of(model)
    state = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in base.state_dict(keep_vars=False).items()
        if ".lora_" not in key
    }
    for name, layer in adapted_layers(model, adapter).items():
        if not layer.get_base_layer().weight.is_floating_point():
            raise AdapterError(
                f"merge: layer {name} is quantised; load the base unquantised and merge there"
            )
        a_RD, b_OR = factors(layer, adapter)
        with full_precision():
            delta_OD = (b_OR @ a_RD) * scale
        if isinstance(layer.get_base_layer(), Conv1D):
            delta_OD = delta_OD.T
        weight = state[f"{name}.weight"]
        merged = weight.to(delta_OD.dtype) + delta_OD
        state[f"{name}.weight"] = merged.to(dtype or weight.dtype).contiguous()
    try:
        base.save_pretrained(str(folder), state_dict=_cast(state, dtype))
        if dtype is not None:  # save_pretrained writes that of the live model
            config = copy.deepcopy(base.config)
            config.dtype = dtype
            config.save_pretrained(str(folder))
    except ValueError as error:  # transformers checks what it copies, the base's settings too
        first = str(error).strip().splitlines()[0]
        raise AdapterError(
            f"merge: transformers refuses to save this base ({first}); mend its "
            "generation_config.json first"
        ) from error
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"merge: could not write {folder} ({str(error).strip()}); free some space, or choose "
            "another folder"
        ) from error
    return folder


def _cast(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Floating tensors in another dtype; tied ones stay one tensor."""
    if dtype is None:
        return state
    made: dict[tuple[int, torch.Size], Tensor] = {}
    found = dict(state)  # the originals stay alive, so that no address is used twice
    for name, tensor in state.items():
        if tensor.is_floating_point():
            found[name] = made.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))
    return found
