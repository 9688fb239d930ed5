"""Which layers PEFT would make for a base's targets, known before anything is calibrated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.load import PEFT_ERRORS, first_line, removal
from forgetless.adapters.variant import BothVariant
from forgetless.errors import AdapterError
from forgetless.methods.base import Method
from forgetless.models.state import random_state_kept
from forgetless.models.targets import Target, base_of

PROBE = "forgetless-probe"


def refuse_unholdable(model: nn.Module, method: Method, targets: Mapping[str, Target]) -> None:
    """Let PEFT wrap one layer of each kind, and refuse what could not hold the method's adapter.

    The model is left as it was found.

    Args:
        model: The base, or a PeftModel around it.
        method: Its form is what must be held.
        targets: Layers that are to get an adapter.

    Raises:
        AdapterError: A layer that PEFT makes no LoRA for, or one whose LoRA cannot hold the form.
    """
    for target in _one_of_each_kind(targets).values():
        undo = removal(model, PROBE)
        try:
            layer = _wrapped(model, target)
            if method.form == "both":
                BothVariant.refuse_layer(layer, PROBE)
        finally:
            undo()


def _wrapped(model: nn.Module, target: Target) -> LoraLayer:
    """PEFT's layer around a target, holding the adapter PROBE."""
    config = LoraConfig(
        r=1, target_modules=[target.name], fan_in_fan_out=isinstance(target.module, Conv1D)
    )
    try:
        # Warnings are heard when the adapter itself is made; PEFT draws its start at random.
        with warnings.catch_warnings(action="ignore"), random_state_kept():
            if isinstance(model, PeftModel):
                model.add_adapter(PROBE, config)
            else:
                inject_adapter_in_model(config, model, adapter_name=PROBE)
    except (*PEFT_ERRORS, ImportError) as error:
        raise AdapterError(
            f"targets: expected layers that PEFT has a LoRA for, got {target.name}, a "
            f"{type(target.module).__name__} ({first_line(error)}); install what PEFT asks for, "
            "leave the layer out of targets, or load the base in another quantisation"
        ) from error
    return base_of(model).get_submodule(target.name)


def _one_of_each_kind(targets: Mapping[str, Target]) -> dict[object, Target]:
    """PEFT decides by the types of the layer and of its weight."""
    kinds: dict[object, Target] = {}
    for target in targets.values():
        weight = getattr(target.module, "weight", None)  # quantised layers may call it otherwise
        kinds.setdefault((type(target.module), type(weight)), target)
    return kinds
