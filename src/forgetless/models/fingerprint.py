"""A short hash that tells one base model from another, whatever adapters are attached to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

SAMPLED_ELEMENTS = 4096  # per tensor


def model_fingerprint(model: nn.Module) -> str:
    """Hash names, shapes, dtypes and a sample of the values of the base model; 16 hex digits.

    PEFT's tensors and the names it adds are left out, so that the value is the same with and
    without adapters. Tied parameters count once. Buffers that a checkpoint holds count too: some
    quantised layers keep their weights there.
    """
    state = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in _base_tensors(model, ""):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        state.update(_sample_bytes(tensor))
    state.update(_architecture(model).encode())
    return state.hexdigest()[:16]


def _base_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    module = _without_peft(module)
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    buffers = dict(module.named_buffers(recurse=False))
    if buffers:
        stored = module.state_dict(keep_vars=True)
        yield from ((prefix + name, buffers[name]) for name in buffers if name in stored)
    for name, child in module.named_children():
        yield from _base_tensors(child, f"{prefix}{name}.")


def _without_peft(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, PeftModel):
            module = module.get_base_model()
        elif isinstance(module, BaseTuner):
            module = module.model
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _architecture(model: nn.Module) -> str:
    base = _without_peft(model)
    kind = base.config.model_type if isinstance(base, PreTrainedModel) else ""
    return f"{type(base).__name__} {kind}"


def _sample_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    # An odd stride: an even one would see but a few columns where the width is a power of two.
    stride = max(1, -(-flat.numel() // SAMPLED_ELEMENTS)) | 1
    return flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes()
