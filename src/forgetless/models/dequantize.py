"""The dense weight that a linear layer computes with, however it is stored.

By what a layer can do and not by its type: a float weight, a tensor or a module that dequantises
itself, bitsandbytes' codes and scales; what is left tells its weight by what it does to unit
vectors. The layer goes on to compute the same: PEFT's own `dequantize_module_weight` loses the
scales of an int8 layer on a CPU.
"""

# Shape letters in this file: O = layer output width, D = layer input width, N = unit vectors.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from forgetless.errors import ModelError
from forgetless.models.bitsandbytes_cpu import keep_trainable_layout

DENSE = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
AT_ONCE = 1024  # unit vectors in a forward pass
LINEARITY = 2e-2  # what 16-bit kernels may round


def dense_weight(name: str, module: Any) -> Tensor:
    """The weight, (O, D) but for Conv1D's (D, O), in the dtype that the layer dequantises to.

    Raises:
        ModelError: A layer that cannot compute here, or that is not linear in its input.
    """
    if hasattr(module, "W_q"):  # HQQ
        return module.dequantize().detach()
    weight = getattr(module, "weight", None)  # other quantised layers call it otherwise
    if not isinstance(weight, Tensor):
        return _by_unit_vectors(name, module)
    if is_traceable_wrapper_subclass(weight):  # torchao, quanto
        return weight.detach().dequantize()
    if hasattr(weight, "quant_state"):
        return _bitsandbytes_4bit(module)
    if hasattr(weight, "SCB"):
        return _bitsandbytes_8bit(module)
    return weight.detach() if weight.dtype in DENSE else _by_unit_vectors(name, module)


def _bitsandbytes_4bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    keep_trainable_layout(module)  # bitsandbytes reads a repacked weight as if it were not
    return dequantize_4bit(module.weight.detach(), module.weight.quant_state)


def _bitsandbytes_8bit(module: Any) -> Tensor:
    """Codes times the scale of their row, wherever the layer keeps that after a forward pass."""
    state = module.state_dict()
    if "SCB" not in state:  # has_fp16_weights: not quantised
        return module.weight.detach()
    return state["weight"].float() * (state["SCB"].float() / 127.0)[:, None]


def _by_unit_vectors(name: str, module: Any) -> Tensor:
    """Rows of the identity through the layer, less what it makes of 0, its bias."""
    like = next((t for t in _tensors(module) if t.dtype in DENSE), None)  # scales or a bias
    device = next(iter(_tensors(module))).device
    dtype = torch.float32 if like is None else like.dtype
    eye_DD = torch.eye(int(module.in_features), dtype=dtype, device=device)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            zero_O = module(torch.zeros_like(eye_DD[:1]))
            rows = [module(part_ND) - zero_O for part_ND in eye_DD.split(AT_ONCE)]
            weight_OD = torch.cat(rows).T.contiguous()
            probe_1D = torch.linspace(-1, 1, eye_DD.shape[0], dtype=dtype, device=device)[None]
            found_O = (module(probe_1D) - zero_O).float()
    except (RuntimeError, NotImplementedError, ImportError) as error:
        raise ModelError(
            f"layer {name}: expected a {type(module).__name__} that can be dequantised or computes "
            f"on {device.type}, got {str(error).splitlines()[0]}; load the full-precision model, "
            "or leave the layer out of targets"
        ) from error
    expected_O = probe_1D.float() @ weight_OD.float().T
    if not bool((found_O - expected_O).norm() <= LINEARITY * expected_O.norm() + 1e-6):
        raise ModelError(
            f"layer {name}: expected a linear layer, got a {type(module).__name__} whose output is "
            "no product with one matrix; leave it out of targets"
        )
    return weight_OD


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer with widths keeps its weight in codes: some tensor of it is not dense."""
    return any(
        t.ndim >= 2 and (t.dtype not in DENSE or is_traceable_wrapper_subclass(t))
        for t in _tensors(module)
    )
