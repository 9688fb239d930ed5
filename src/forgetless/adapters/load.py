"""Open an adapter folder on its base: any PEFT LoRA, our exports, and our training checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from forgetless.adapters.base_identity import check_base
from forgetless.adapters.forms import FORMS, adapted_layers, factors
from forgetless.adapters.plain_lora import refuse_changed_base
from forgetless.adapters.variant import FIXED_A, LIVE_BOTH, BothVariant
from forgetless.errors import AdapterError, ArtefactError
from forgetless.models.bitsandbytes_cpu import keep_trainable_layout
from forgetless.models.untouched import refuse_touched_base

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# What PEFT raises over a configuration, or tensors, that do not fit a base; its own derive from
# these, and a ForgetlessError is never raised inside the calls guarded by them.
PEFT_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def load_adapter(
    base: PreTrainedModel | PeftModel, folder: Path | str, *, adapter: str = "default"
) -> PeftModel:
    """Load a LoRA adapter from a folder onto its base, for evaluation or export.

    A checkpoint of the form `both`, which PEFT alone refuses, is opened here too. Nothing of the
    adapter requires a gradient: to train on, attach as before and resume. After an error the base
    is as it was.

    Args:
        base: The base model, or a PeftModel that gets one more adapter.
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.
        adapter: Name to load it under.

    Raises:
        AdapterError: No adapter there, not LoRA, of another base or a model with other layers, or
            of a base that its own start has changed; a base that holds adapters already, outside a
            PeftModel.
        ArtefactError: A truncated or damaged file, or one without tensors that its form needs.

    Warns:
        ForgetlessWarning: The adapter names another base than this one.
    """
    folder = Path(folder)
    if isinstance(base, PeftModel) and adapter in base.peft_config:
        raise AdapterError(f"adapter {adapter!r}: already there; give adapter= another name")
    refuse_touched_base(base)
    keep_trainable_layout(base)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    check_base(base, folder / WEIGHTS, config.base_model_name_or_path)
    holds_both = read_adapter_config(folder).get("init_lora_weights") == LIVE_BOTH
    with ExitStack() as undo:
        undo.callback(removal(base, adapter))
        model = _inject(base, config, adapter, folder)
        if holds_both or any(f".{FIXED_A}." in key for key in tensors):
            for layer in adapted_layers(model, adapter).values():
                BothVariant.install(layer, adapter)
                FORMS["both"].freeze(layer, adapter)
            model.peft_config[adapter].init_lora_weights = LIVE_BOTH
        _fill(model, tensors, adapter, folder)
        undo.pop_all()
    model.set_adapter(adapter, inference_mode=True)
    model.eval()
    return model


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` in a folder says.

    Raises:
        AdapterError: There is none.
        ArtefactError: It is truncated, or no mapping.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder}: expected an adapter folder with {CONFIG}, found {found_instead(folder)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: truncated or damaged ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise ArtefactError(
            f"{path}: expected a mapping, got {type(values).__name__}; copy it again"
        )
    return values


def found_instead(folder: Path) -> str:
    """What lies in a folder in place of a configuration, and what to do."""
    others = sorted(folder.glob("*.gguf"))
    if others:
        return f"{others[0].name}, which llama.cpp reads; name the adapter it was exported from"
    return "none; check the path"


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    values = read_adapter_config(folder)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{path}: expected peft_type LORA, got {kind}; only LoRA can be measured"
        )
    if values.get("use_dora"):
        raise AdapterError(
            f"{path}: expected LoRA, got DoRA, which cannot be measured as plain LoRA: it scales "
            "the base's weights too; merge it, and compare the merged model"
        )
    refuse_changed_base(str(path), values.get("init_lora_weights", True))
    if values.get("bias", "none") != "none" or values.get("layer_replication"):
        raise AdapterError(
            f"{path}: expected an adapter beside the base, got bias or layer_replication, which "
            "change the base itself; save the merged model and evaluate that"
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except PEFT_ERRORS as error:
        raise AdapterError(
            f"{path}: expected a LoRA configuration, got {first_line(error)}; save it again"
        ) from error
    if isinstance(config.init_lora_weights, str):
        # The tensors are overwritten: never re-run a data-driven init of another library.
        config.init_lora_weights = True
    config.inference_mode = True
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder}: expected {WEIGHTS}, found none; save it as safetensors")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: truncated or damaged ({error}); copy it again") from error


def _inject(
    base: PreTrainedModel | PeftModel, config: LoraConfig, adapter: str, folder: Path
) -> PeftModel:
    """Let PEFT make its layers; what it says of a configuration that does not fit is passed on."""
    try:
        if isinstance(base, PeftModel):
            base.add_adapter(adapter, config)
            return base
        return get_peft_model(base, config, adapter_name=adapter)
    except PEFT_ERRORS as error:
        raise AdapterError(
            f"{folder}: does not fit this base model ({first_line(error)}); "
            "load it on the model that it was trained on"
        ) from error


def removal(base: PreTrainedModel | PeftModel, adapter: str) -> Callable[[], None]:
    """What takes an adapter that is about to be loaded off again, however far PEFT comes.

    Layers that PEFT wraps for it are unwrapped, so that modules, flags and modes are as now.
    """
    children = [(m, name, child) for m in base.modules() for name, child in m.named_children()]
    flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    modes = [(module, module.training) for module in base.modules()]
    was_bare = not hasattr(base, "peft_config")  # PEFT hangs it on the base

    def undo() -> None:
        if isinstance(base, PeftModel):
            for module in base.modules():
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(adapter)
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    module.delete_adapter(adapter, None)
            base.peft_config.pop(adapter, None)
        elif was_bare and hasattr(base, "peft_config"):
            del base.peft_config
        for parent, name, child in children:
            setattr(parent, name, child)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training

    return undo


def _fill(model: PeftModel, tensors: dict[str, Tensor], adapter: str, folder: Path) -> None:
    """Load, and refuse what PEFT would pass over: missing and unexpected keys, wrong shapes."""
    try:
        result = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    except PEFT_ERRORS as error:
        lines = str(error).splitlines()
        first = lines[1].strip() if len(lines) > 1 else first_line(error)
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


def first_line(error: BaseException) -> str:
    """Of what a library said, without the full stop; its type where it said nothing."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".")[:300] if text else type(error).__name__
