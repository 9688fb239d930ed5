"""Open an adapter folder on its base: any PEFT LoRA, our exports, and our training checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.variant import FIXED_A, LIVE_BOTH, BothVariant
from forgetless.errors import AdapterError, ArtefactError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def load_adapter(
    base: PreTrainedModel | PeftModel, folder: Path | str, *, adapter: str = "default"
) -> PeftModel:
    """Load a LoRA adapter from a folder onto its base, for evaluation or export.

    A checkpoint of the form `both`, which PEFT alone refuses, is opened here too.

    Args:
        base: The base model, or a PeftModel that gets one more adapter.
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.
        adapter: Name to load it under.

    Raises:
        AdapterError: No adapter there, not LoRA, or of a model with other layers.
        ArtefactError: A truncated or damaged file.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    both = any(f".{FIXED_A}." in key for key in tensors)
    if isinstance(config.init_lora_weights, str):
        # The tensors are overwritten below: never re-run a data-driven init of another library.
        config.init_lora_weights = True
    config.inference_mode = True
    if isinstance(base, PeftModel):
        base.add_adapter(adapter, config)
        model = base
    else:
        model = get_peft_model(base, config, adapter_name=adapter)
    if both:
        for layer in adapted_layers(model, adapter).values():
            BothVariant.install(layer, adapter)
        model.peft_config[adapter].init_lora_weights = LIVE_BOTH
    _fill(model, tensors, adapter, folder)
    model.set_adapter(adapter)
    model.eval()
    return model


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder}: expected an adapter folder with {CONFIG}, found none; check the path"
        )
    try:
        kind = json.loads(path.read_text()).get("peft_type")
    except ValueError as error:
        raise ArtefactError(f"{path}: truncated or damaged ({error}); copy it again") from error
    if kind != "LORA":
        raise AdapterError(
            f"{path}: expected peft_type LORA, got {kind}; only LoRA can be measured"
        )
    return LoraConfig.from_pretrained(str(folder))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder}: expected {WEIGHTS}, found none; save it as safetensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtefactError(f"{path}: truncated or damaged ({error}); copy it again") from error


def _fill(model: PeftModel, tensors: dict[str, Tensor], adapter: str, folder: Path) -> None:
    """Load, and refuse what PEFT would pass over: missing and unexpected keys, wrong shapes."""
    try:
        result = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise AdapterError(f"{folder}: does not fit this base model ({first})") from error
    missing = [k for k in result.missing_keys if "lora_" in k and f".{adapter}." in k]
    if missing or result.unexpected_keys:
        odd = (missing or result.unexpected_keys)[0]
        raise AdapterError(
            f"{folder}: does not fit this base model: {len(missing)} tensors missing, "
            f"{len(result.unexpected_keys)} unexpected, the first {odd}"
        )
    for name, layer in adapted_layers(model, adapter).items():
        for tensor in factors(layer, adapter):
            if not tensor.isfinite().all():
                raise ArtefactError(f"{folder}: layer {name} holds NaN or inf; train it again")
