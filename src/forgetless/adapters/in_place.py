"""Start an adapter that PEFT has made already, such as one that a trainer made from a LoraConfig.

Its layers, targets, rank and scale stay those of its configuration; only its start is replaced.
"""

from __future__ import annotations

from peft import PeftModel

from forgetless.adapters.forms import adapted_layers, form_of
from forgetless.adapters.plain_lora import KEEPS_BASE, refuse_what_plain_lora_cannot_hold
from forgetless.adapters.variant import BothVariant
from forgetless.errors import AdapterError
from forgetless.methods.base import Method


def check_startable(model: PeftModel, method: Method, adapter: str) -> None:
    """Refuse an adapter that is no ordinary LoRA without an update, or that the method cannot use.

    Args:
        model: Holds the adapter.
        method: Its rank, and its alpha where one is given, must be the adapter's.
        adapter: Name of the adapter.

    Raises:
        AdapterError: A start that has changed the base, anything besides B A on linear layers, an
            update already, another rank or scale than the method's, or a layer that cannot hold
            the method's form.
    """
    where = f"adapter {adapter!r}"
    config = model.peft_config[adapter]
    if config.init_lora_weights not in KEEPS_BASE:
        raise AdapterError(
            f"{where}: expected an adapter on the untouched base, got init_lora_weights="
            f"{config.init_lora_weights!r}, which has changed the base; make it with "
            "LoraConfig(init_lora_weights=True) on a base loaded anew"
        )
    refuse_what_plain_lora_cannot_hold(model, adapter)
    if form_of(model, adapter).name != "plain":
        raise AdapterError(
            f"{where}: expected an ordinary LoRA, got one that a method has started already; start "
            "from the base loaded anew"
        )
    for name, layer in adapted_layers(model, adapter).items():
        if layer.lora_A[adapter].weight.any() and layer.lora_B[adapter].weight.any():
            raise AdapterError(
                f"{where}: expected one that is not trained yet, got an update in layer {name}, "
                "which a new start would discard; merge it into the base, or add another adapter"
            )
        _refuse_other_shape(where, name, method, layer.r[adapter], layer.scaling[adapter])
        if method.form == "both":
            BothVariant.refuse_layer(layer, adapter)


def _refuse_other_shape(where: str, layer: str, method: Method, rank: int, scale: float) -> None:
    if rank != method.rank:
        raise AdapterError(
            f"{where}: expected rank {method.rank} of method {method.name}, got {rank} in layer "
            f"{layer}; give both the same rank, and no rank_pattern"
        )
    if method.alpha is not None and scale != method.alpha / method.rank:
        raise AdapterError(
            f"{where}: expected the scale alpha / rank = {method.alpha / method.rank:g} of method "
            f"{method.name}, got {scale:g} in layer {layer}; leave alpha out of the method"
        )
