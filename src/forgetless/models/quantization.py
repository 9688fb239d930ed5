"""Quantise a base model while it is loaded, by a name; and say how one is quantised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig

from forgetless.errors import ModelError

EXTRA = "pip install 'forgetless[quantized]'"


@dataclass(frozen=True, slots=True)
class Quantizer:
    """One way to quantise.

    Attributes:
        package: What must be installed.
        config: transformers' configuration, given the dtype that the model computes in.
    """

    package: str
    config: Callable[[torch.dtype], Any]


def _nf4(dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _int8(_dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(_dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZERS: dict[str, Quantizer] = {
    "nf4": Quantizer("bitsandbytes", _nf4),
    "int8": Quantizer("bitsandbytes", _int8),
    "torchao-int8": Quantizer("torchao", _torchao_int8),
}


def quantization_config(name: str, dtype: torch.dtype, config: PreTrainedConfig) -> Any:
    """What `from_pretrained` needs to quantise on the way; None for `none`.

    Args:
        name: `none`, or one of `QUANTIZERS`.
        dtype: That the model computes in.
        config: The checkpoint's.

    Raises:
        ModelError: No such name, its package is missing, or the checkpoint is quantised already.
    """
    if name == "none":
        return None
    if name not in QUANTIZERS:
        raise ModelError(
            f"quantization: expected none, {', '.join(QUANTIZERS)}, got {name!r}; a checkpoint "
            "that is quantised already needs none"
        )
    already = quantization_of(config)
    if already is not None:
        raise ModelError(
            f"quantization: expected none, as the checkpoint is quantised already ({already}), "
            f"got {name}; leave it out, or name the full-precision model"
        )
    package = QUANTIZERS[name].package
    if find_spec(package) is None:
        raise ModelError(
            f"quantization: {name} needs the package {package}, which is not installed; {EXTRA}"
        )
    return QUANTIZERS[name].config(dtype)


def quantization_of(config: PreTrainedConfig) -> str | None:
    """How a model is quantised, in words: `bitsandbytes nf4`, `torchao int8`, `gptq 4-bit`.

    Args:
        config: Of a loaded model, or of a checkpoint.

    Returns:
        None for one that is not.
    """
    values = config.to_dict().get("quantization_config")
    if not values:
        return None
    if not isinstance(values, dict):
        values = values.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if values.get("load_in_4bit"):
        return f"{method} {values.get('bnb_4bit_quant_type', '4-bit')}"
    if values.get("load_in_8bit"):
        return f"{method} int8"
    if "quant_type" in values:
        return f"{method} {_kind_of_torchao(values['quant_type'])}"
    bits = values.get("bits") or values.get("nbits")
    return f"{method} {bits}-bit" if bits else method


def _kind_of_torchao(value: Any) -> str:
    """Name of torchao's configuration: a class by itself, or its name inside a saved mapping."""
    if isinstance(value, dict):
        inner = value.get("default", value)
        value = inner.get("_type", "unknown") if isinstance(inner, dict) else inner
    name = value if isinstance(value, str) else type(value).__name__
    return "int8" if name == "Int8WeightOnlyConfig" else name
