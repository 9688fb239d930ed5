"""ΔW scaled by a factor: the free baseline of every comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from forgetless.adapters.forms import adapted_layers, peft_model_of
from forgetless.adapters.plain_lora import refuse_what_plain_lora_cannot_hold


@contextmanager
def scaled_adapter(model: nn.Module, factor: float, adapter: str = "default") -> Iterator[None]:
    """Inside the block the adapter's ΔW is multiplied by `factor`; exact, and restored after.

    Raises:
        AdapterError: An adapter that holds more than ΔW.
    """
    refuse_what_plain_lora_cannot_hold(peft_model_of(model), adapter)
    layers = adapted_layers(model, adapter)
    before = {name: layer.scaling[adapter] for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.scaling[adapter] = before[name] * factor
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling[adapter] = before[name]
