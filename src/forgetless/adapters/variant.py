"""The `both` form inside a PEFT layer: z = a x; result + s·(B0 z + b (z + A0 x)).

Every product is a module call, so that the hooks by which FSDP and ZeRO gather parameters fire.
`LoraVariant` is private to PEFT: the supported range is pinned, and a contract test calls each
method here.
"""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import transpose
from torch import Tensor, nn

from forgetless.adapters.mixed_dtypes import in_dtype_of_weight
from forgetless.errors import AdapterError
from forgetless.linalg.lowrank import concatenated_delta
from forgetless.linalg.precision import full_precision

# `init_lora_weights` of a live adapter of this form: PEFT alone refuses the folder, loudly.
LIVE_BOTH = "forgetless-both: run forgetless export first"
FIXED_A = "lora_fixed_A"
FIXED_B = "lora_fixed_B"


class BothVariant(LoraVariant):
    """Deviations `lora_A`, `lora_B` beside frozen `lora_fixed_A`, `lora_fixed_B`."""

    @classmethod
    def install(cls, layer: LoraLayer, adapter: str) -> None:
        """Give a layer the fixed modules and this variant; only layers that call variants qualify.

        Raises:
            AdapterError: As `refuse_layer`.
        """
        cls.refuse_layer(layer, adapter)
        if FIXED_A not in layer.adapter_layer_names:
            setattr(layer, FIXED_A, nn.ModuleDict())
            setattr(layer, FIXED_B, nn.ModuleDict())
            layer.adapter_layer_names = (*layer.adapter_layer_names, FIXED_A, FIXED_B)
        for fixed, like in ((FIXED_A, layer.lora_A[adapter]), (FIXED_B, layer.lora_B[adapter])):
            weight = like.weight
            made = nn.Linear(
                weight.shape[1],
                weight.shape[0],
                bias=False,
                device=weight.device,
                dtype=weight.dtype,
            ).requires_grad_(False)
            made.register_forward_pre_hook(in_dtype_of_weight)
            getattr(layer, fixed)[adapter] = made
        layer.lora_variant[adapter] = cls()

    @staticmethod
    def refuse_layer(layer: LoraLayer, adapter: str) -> None:
        """Refuse a layer that cannot hold this form.

        Raises:
            AdapterError: Dropout, or a layer kind whose forward or merge ignores variants.
        """
        if not isinstance(layer.lora_dropout[adapter], nn.Identity):
            raise AdapterError("trains: both: expected LoRA dropout 0; use trains: a or trains: b")
        where = f"trains: both: PEFT's {type(layer).__name__}"
        if not _looks_at_variants(type(layer).forward):
            raise AdapterError(
                f"{where} never calls a variant and would train nothing; use trains: a or trains: b"
            )
        merge = type(layer).merge
        if merge is not BaseTunerLayer.merge and not _looks_at_variants(merge):
            raise AdapterError(
                f"{where} merges without calling the variant, so that a merged model would lack "
                "most of the update; use trains: a or trains: b"
            )

    def supports_lora_conversion(self) -> bool:
        """PEFT's conversion reads `lora_A` and `lora_B` only: use `forgetless export`."""
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to do: `install` runs after PEFT has made the layer."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Base output plus the deviation from B0 A0."""
        fixed_A = getattr(module, FIXED_A)[active_adapter]
        fixed_B = getattr(module, FIXED_B)[active_adapter]
        z = module.lora_A[active_adapter](x)
        deviation = fixed_B(z) + module.lora_B[active_adapter](z + fixed_A(x))
        return result + deviation * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new tensor, W + ΔW."""
        return orig_weight + _delta(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """W += ΔW, in place."""
        orig_weight.data += _delta(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new tensor, W - ΔW."""
        return orig_weight - _delta(module, active_adapter, orig_weight)


def _delta(layer: LoraLayer, adapter: str, like: Tensor) -> Tensor:
    a_RD, b_OR = concatenated_delta(
        layer.lora_A[adapter].weight.detach(),
        layer.lora_B[adapter].weight.detach(),
        getattr(layer, FIXED_A)[adapter].weight.detach(),
        getattr(layer, FIXED_B)[adapter].weight.detach(),
    )
    dtype = torch.promote_types(torch.promote_types(a_RD.dtype, b_OR.dtype), torch.float32)
    with full_precision():
        delta_OD = b_OR.to(dtype) @ a_RD.to(dtype)
    return (transpose(delta_OD, layer.fan_in_fan_out) * layer.scaling[adapter]).to(like.dtype)


def _looks_at_variants(method: Callable[..., Any]) -> bool:
    """Whether a method of one of PEFT's layers reads `lora_variant`.

    Read off its code, as nothing tells it that works without a GPU and the layer's library; a
    contract test compares with what the layers do when they are called.
    """
    return "lora_variant" in inspect.unwrap(method).__code__.co_names
