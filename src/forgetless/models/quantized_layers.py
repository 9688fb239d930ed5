"""Which layers of a model that calls itself quantised are; libraries pass over some silently."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from forgetless.errors import ForgetlessWarning, ModelError
from forgetless.models.bitsandbytes_cpu import misread_layers
from forgetless.models.dequantize import DENSE, is_quantized
from forgetless.models.quantization import QUANTIZERS, quantization_of
from forgetless.models.targets import find_targets

SHOWN = 3  # names in a message


def check_quantized_layers(model: PreTrainedModel, asked_for: str) -> None:
    """Refuse a model of which nothing was quantised; warn of layers and experts left as they are.

    Args:
        model: As loaded.
        asked_for: `none` for a checkpoint that may be quantised already, else one of `QUANTIZERS`.

    Raises:
        ModelError: A quantisation was asked for, and no layer took it.
    """
    kind = quantization_of(model.config)
    if kind is None:
        return
    _warn_of_misread(model)
    layers = find_targets(model).targets
    left = [name for name, target in layers.items() if not is_quantized(target.module)]
    fused = _fused(model)
    if len(left) == len(layers) and asked_for != "none":
        types = sorted({type(target.module).__name__ for target in layers.values()})
        others = ", ".join(name for name in QUANTIZERS if name != asked_for)
        raise ModelError(
            f"quantization: expected {asked_for} to quantise linear layers, got none of "
            f"{len(layers)} ({', '.join(types)}), which {QUANTIZERS[asked_for].package} passes "
            f"over; use another one ({others}), or none"
        )
    if not left and not fused:
        return
    parts = [f"{len(layers) - len(left)} of {len(layers)} linear layers are quantised"]
    if left:
        parts.append(f"left as they are: {_first(left)}")
    if fused:
        parts.append(
            f"fused weights of experts are not ({sum(fused.values())} numbers): "
            f"{_first(list(fused))}"
        )
    warnings.warn(
        f"quantization {kind}: {'; '.join(parts)}; they keep the memory and the values of "
        f"{str(model.dtype).removeprefix('torch.')}",
        ForgetlessWarning,
        stacklevel=3,
    )


def _warn_of_misread(model: nn.Module) -> None:
    misread = misread_layers(model)
    if misread:
        warnings.warn(
            f"quantization: bitsandbytes reads {len(misread)} 4-bit layers wrongly on a CPU, since "
            f"their input width is no multiple of the block of scales: {_first(misread)}; use "
            "int8 or torchao-int8",
            ForgetlessWarning,
            stacklevel=4,
        )


def _fused(model: nn.Module) -> dict[str, int]:
    """Dense weights with a matrix for each expert, and how many numbers they hold."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):  # kernels of a convolution have three axes, too
            continue
        for last, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and weight.dtype in DENSE:
                found[f"{name}.{last}"] = weight.numel()
    return found


def _first(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
