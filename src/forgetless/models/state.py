"""Borrow the user's model: modes, gradients and adapters are as before when it is handed back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from forgetless.models.bitsandbytes_cpu import keep_trainable_layout


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Restore training modes, `requires_grad` and active adapters on exit, after an error too.

    Each module's mode is restored on its own: a PeftModel that was just made is in training mode
    around a base in eval mode, and `train()` on it would switch the base's dropout on. Each
    parameter's flag is, because leaving `disable_adapter()` and `set_adapter()` thaw adapter
    weights that were frozen by hand. Modules that were added meanwhile are left alone. 4-bit layers
    keep the layout that they can be trained in.
    """
    keep_trainable_layout(model)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    activate_again = activation(model)
    try:
        yield
    finally:
        activate_again()
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (CPU and GPUs) on exit."""
    # The legacy state of NumPy is the one that the libraries' samplers draw from.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def trainable_copy(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains, by name, off the accelerator."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def activation(model: nn.Module) -> Callable[[], None]:
    """What makes the adapters that are active now active again; does nothing without adapters."""
    if not isinstance(model, PeftModel):
        return lambda: None
    active, named = list(model.active_adapters), model.active_adapter
    return lambda: _activate(model, active, named)


def _activate(model: PeftModel, adapters: list[str], named: str | None) -> None:
    """Make `adapters` the active ones; `PeftModel.set_adapter` takes but one name.

    `named` is the wrapper's own idea of the active adapter, one name even where several are active.
    """
    if list(model.active_adapters) == adapters or not all(a in model.peft_config for a in adapters):
        return
    model.base_model.set_adapter(adapters)
    model.active_adapter = named
