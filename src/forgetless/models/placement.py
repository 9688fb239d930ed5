"""Where a model computes, where its weights lie: accelerate may keep them elsewhere, even on disk.

A model that is larger than the accelerator's memory, or than main memory, is loaded with a
`device_map`: accelerate then hangs a hook on each layer that fetches its weights for its own
forward pass. In between they are on the meta device and hold nothing.

FSDP and DeepSpeed's ZeRO-3 leave each process a part of every weight, once training has begun.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

Sharding = Literal["FSDP", "DeepSpeed"]


def with_weights(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the parameters and buffers of a layer itself hold their values."""
    context: AbstractContextManager[None] = align_module_device(module)
    return context


def values_of(module: nn.Module, name: str, held: Tensor) -> Tensor:
    """A tensor of a layer by the name that it has there, fetched where it is kept elsewhere."""
    if not held.is_meta:
        return whole(held)
    with with_weights(module):
        found: Tensor = getattr(module, name)
        return found.detach()


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds but a part of the weights."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP's first version has put parts of flat vectors in place of the weights."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; of one that is sharded every process must ask for it.

    Of what FSDP has sharded it is live, of what DeepSpeed has a copy without a gradient.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not hasattr(tensor, "ds_id"):
        return tensor
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def computes_on(module: nn.Module) -> torch.device:
    """The device of a layer's forward pass."""
    hooks = getattr(module, "_hf_hook", None)  # accelerate sets it where there is one
    for hook in hooks.hooks if isinstance(hooks, SequentialHook) else [hooks]:
        if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(iter([*module.parameters(recurse=False), *module.buffers()])).device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids must be."""
    return computes_on(model.get_input_embeddings())
