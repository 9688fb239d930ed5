"""A short hash that tells one base model from another, whatever adapters are attached to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forgetless.models.bitsandbytes_cpu import keep_trainable_layout
from forgetless.models.dequantize import is_quantized
from forgetless.models.placement import values_of

# Configuration keys that say nothing about what the model computes: where it came from and what
# wrote it, what the tensors tell already, and what training libraries change on the way.
IGNORED_KEYS = {
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "architectures",
    "auto_map",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "gradient_checkpointing",
    "output_router_logits",
    "router_aux_loss_coef",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def model_fingerprint(model: nn.Module) -> str:
    """Hash the base model: its tensors, and its configuration as far as that changes results.

    Of the tensors names, shapes, dtypes and every byte of the values count, as a few edited rows of
    an embedding make another model; of the configuration all but `IGNORED_KEYS`, and the
    implementation of attention. PEFT's tensors and the names it adds
    are left out, so that the value, 16 hex digits, is the same with and without adapters. Tied
    parameters count once. Buffers that a checkpoint holds count too, and the scales of quantised
    layers, wherever these keep them.
    """
    keep_trainable_layout(model)
    state = hashlib.sha256()
    seen: set[int] = set()
    tied = _tied_names(model)
    for name, tensor, owner in list(_base_tensors(model, "")):  # a list: no id comes twice
        if id(tensor) in seen or (tensor.is_meta and name in tied):
            continue
        seen.add(id(tensor))
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        for part in _plain_parts(values_of(owner, name.rpartition(".")[2], tensor)):
            state.update(_bytes(part))
    state.update(_architecture(model).encode())
    return state.hexdigest()[:16]


def rounded_fingerprint(model: nn.Module) -> str | None:
    """Hash of the base's weights rounded to bfloat16: the same in whichever dtype it is loaded.

    For telling whose adapter one is; finer differences than bfloat16 holds, and the configuration,
    do not count.

    Returns:
        16 hex digits; None for weights that are neither float32 nor bfloat16, as float16 and
        quantisation round in other places.
    """
    state = hashlib.sha256()
    seen: set[int] = set()
    tied = _tied_names(model)
    for name, tensor, owner in _base_tensors(model, ""):
        if id(tensor) in seen or (tensor.is_meta and name in tied):
            continue
        if tensor.dtype in (torch.bool, torch.int64):  # masks, positions
            continue
        seen.add(id(tensor))
        if not _rounds_alike(tensor):
            return None
        _add_rounded(state, name, tensor, owner)
    return state.hexdigest()[:16]


def unquantized_fingerprint(model: nn.Module) -> str | None:
    """Hash of what no quantisation touches, rounded to bfloat16: embeddings and norms.

    The same for a base and for that base quantised in any way, so that an adapter may be opened on
    either; two bases that differ in their linear layers alone are not told apart.

    Returns:
        16 hex digits; None where an embedding is quantised, or held in float16.
    """
    state = hashlib.sha256()
    found = 0
    base = _without_peft(model)
    linear = {name for name, module in _base_modules(base, "") if _is_linear(module)}
    for name, tensor, owner in _base_tensors(base, ""):
        if tensor.ndim > 2 or not isinstance(tensor, nn.Parameter):  # experts, buffers
            continue
        if name.rpartition(".")[0] in linear:
            continue
        if not _rounds_alike(tensor):
            return None
        _add_rounded(state, name, tensor, owner)
        found += 1
    return state.hexdigest()[:16] if found else None


def _tied_names(model: nn.Module) -> Container[str]:
    """Names of tensors that are another one: accelerate offloads them apart."""
    base = _without_peft(model)
    return base.all_tied_weights_keys if isinstance(base, PreTrainedModel) else ()


def _rounds_alike(tensor: Tensor) -> bool:
    """Whether a tensor rounded to bfloat16 is what its source rounded to bfloat16 is."""
    is_plain = isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor)
    return is_plain and tensor.dtype in (torch.float32, torch.bfloat16)


def _add_rounded(state: Any, name: str, tensor: Tensor, owner: nn.Module) -> None:
    state.update(f"{name} {tuple(tensor.shape)}\0".encode())
    values = values_of(owner, name.rpartition(".")[2], tensor)
    state.update(_bytes(values.detach().to(torch.bfloat16)))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or hasattr(module, "in_features")


def _base_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Name, tensor as it is held (perhaps on the meta device), and the layer that owns it."""
    module = _without_peft(module)
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter, module
    buffers = dict(module.named_buffers(recurse=False))
    if buffers:
        stored = module.state_dict(keep_vars=True)
        yield from ((prefix + name, buffers[name], module) for name in buffers if name in stored)
    yield from ((prefix + name, tensor, module) for name, tensor in _scales(module).items())
    for name, child in module.named_children():
        yield from _base_tensors(child, f"{prefix}{name}.")


def _base_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules by the names that `_base_tensors` gives, without the last dot."""
    module = _without_peft(module)
    yield prefix.removesuffix("."), module
    for name, child in module.named_children():
        yield from _base_modules(child, f"{prefix}{name}.")


def _scales(module: nn.Module) -> dict[str, Tensor]:
    """What a quantised layer's checkpoint holds besides its parameters and buffers."""
    if not hasattr(module, "in_features") or not is_quantized(module):
        return {}
    known = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    stored = module.state_dict(keep_vars=True)
    return {k: v for k, v in stored.items() if isinstance(v, Tensor) and k not in known}


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantised one consists of; else the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_parts(getattr(tensor, name))


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
    if not isinstance(base, PreTrainedModel):
        return type(base).__name__
    config: PreTrainedConfig = base.config
    described = [type(base).__name__, _without_ignored(config.to_dict()), _attention(config)]
    return json.dumps(described, sort_keys=True, default=str)


def what_computes(model: PreTrainedModel) -> dict[str, Any]:
    """Class, attention and configuration, as far as they change results."""
    found: dict[str, Any] = _without_ignored(model.config.to_dict())
    return {"class": type(model).__name__, "attention": _attention(model.config), **found}


def _attention(config: PreTrainedConfig) -> list[str]:
    # to_dict leaves it out; a model with several parts may compute attention differently in each.
    return [config._attn_implementation, config.get_text_config()._attn_implementation]


def _without_ignored(value: Any) -> Any:
    """A configuration, with those of its parts, without the ignored keys."""
    if isinstance(value, dict):
        return {str(k): _without_ignored(v) for k, v in value.items() if k not in IGNORED_KEYS}
    return value


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
