"""The four ways to hold an adapter in a PEFT layer: plain, a, b and both.

All of them start exactly at the base.

| form | PEFT holds | ΔW, without the scale |
|---|---|---|
| plain | A = A0, B = 0, both train | B A |
| b | A = A0 frozen, B = 0 | B A0 |
| a | B = B0 frozen, A = 0 | B0 A |
| both | deltas a = b = 0 beside frozen A0, B0 | (B0 + b)(A0 + a) - B0 A0 |

Everything downstream (export, merge, drift, update size) asks a form for its exact factors only.
"""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from forgetless.adapters.mixed_dtypes import in_dtype_of_weight
from forgetless.adapters.variant import FIXED_A, FIXED_B, BothVariant
from forgetless.errors import AdapterError
from forgetless.linalg.lowrank import concatenated_delta
from forgetless.methods.base import AdapterInit, Trains
from forgetless.models.placement import computes_on, whole


class Form(ABC):
    """How an adapter is held. Stateless: the layer holds the tensors."""

    name: ClassVar[Trains]
    frozen: ClassVar[tuple[str, ...]]

    def start(self, layer: LoraLayer, adapter: str, init: AdapterInit) -> None:
        """Put (A0, B0) into a layer made by PEFT, with ΔW = 0 exactly, and freeze what must be."""
        _materialise(layer, adapter)
        with torch.no_grad():
            self._fill(layer, adapter, init)
        for name in ("lora_A", "lora_B"):
            getattr(layer, name)[adapter].register_forward_pre_hook(in_dtype_of_weight)
        self.freeze(layer, adapter)

    def freeze(self, layer: LoraLayer, adapter: str) -> None:
        """Keep the frozen side frozen, also through `set_adapter` and `disable_adapter()`."""
        # The layer's own dict, never the class-level one: PEFT re-applies it in set_adapter and
        # when disable_adapter() is left.
        frozen = dict(layer.frozen_peft_weight_names)
        frozen[adapter] = self.frozen
        layer.frozen_peft_weight_names = frozen
        for name in self.frozen:
            getattr(layer, name)[adapter].requires_grad_(False)

    @abstractmethod
    def _fill(self, layer: LoraLayer, adapter: str, init: AdapterInit) -> None: ...

    def deviation(self, layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B with ΔW = B A before scaling, in the adapter's dtype; rank R (2R for `both`).

        Live: gradients flow to what trains.
        """
        return whole(layer.lora_A[adapter].weight), whole(layer.lora_B[adapter].weight)

    def down_projection(self, layer: LoraLayer, adapter: str) -> Tensor:
        """The A (R, D) of the paper, which the adapter reads its input through."""
        return whole(layer.lora_A[adapter].weight).detach()


def _materialise(layer: LoraLayer, adapter: str) -> None:
    """Give an adapter memory where PEFT made it beside weights that accelerate keeps elsewhere."""
    for name in ("lora_A", "lora_B"):
        module = getattr(layer, name)[adapter]
        if module.weight.is_meta:
            module.to_empty(device=computes_on(layer.get_base_layer()))


class _StartsAtA(Form):
    """A = A0, B = 0."""

    def _fill(self, layer: LoraLayer, adapter: str, init: AdapterInit) -> None:
        layer.lora_A[adapter].weight.copy_(init.a_RD)
        layer.lora_B[adapter].weight.zero_()


class Plain(_StartsAtA):
    """Ordinary LoRA."""

    name = "plain"
    frozen = ()


class TrainsB(_StartsAtA):
    """A0 frozen."""

    name = "b"
    frozen = ("lora_A",)


class TrainsA(Form):
    """B0 frozen."""

    name = "a"
    frozen = ("lora_B",)

    def _fill(self, layer: LoraLayer, adapter: str, init: AdapterInit) -> None:
        layer.lora_A[adapter].weight.zero_()
        layer.lora_B[adapter].weight.copy_(init.b_OR)


class TrainsBoth(Form):
    """Deviations of A and B train, beside frozen A0 and B0."""

    name = "both"
    frozen = (FIXED_A, FIXED_B)

    def _fill(self, layer: LoraLayer, adapter: str, init: AdapterInit) -> None:
        BothVariant.install(layer, adapter)
        layer.lora_A[adapter].weight.zero_()
        layer.lora_B[adapter].weight.zero_()
        getattr(layer, FIXED_A)[adapter].weight.copy_(init.a_RD)
        getattr(layer, FIXED_B)[adapter].weight.copy_(init.b_OR)

    def deviation(self, layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
        """A = [a; A0] and B = [B0 + b, b]."""
        a_RD, b_OR = super().deviation(layer, adapter)
        fixed_A_RD = whole(getattr(layer, FIXED_A)[adapter].weight)
        fixed_B_OR = whole(getattr(layer, FIXED_B)[adapter].weight)
        return concatenated_delta(a_RD, b_OR, fixed_A_RD, fixed_B_OR)

    def down_projection(self, layer: LoraLayer, adapter: str) -> Tensor:
        """A0 + a."""
        fixed_A_RD = whole(getattr(layer, FIXED_A)[adapter].weight).detach()
        return fixed_A_RD + super().down_projection(layer, adapter)


FORMS: dict[Trains, Form] = {
    form.name: form for form in (Plain(), TrainsA(), TrainsB(), TrainsBoth())
}


def peft_model_of(model: nn.Module) -> PeftModel:
    """The model itself.

    Raises:
        AdapterError: It is no PeftModel.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(f"model: expected a PeftModel, got {type(model).__name__}; attach first")
    return model


def adapted_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """LoRA layers that hold `adapter`, by the name of their base layer; any PEFT LoRA will do.

    Raises:
        AdapterError: The model has no such adapter, or one that is not LoRA on linear layers.
    """
    layers = {
        name: module
        for name, module in peft_model_of(model).get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    if not layers:
        raise AdapterError(
            f"adapter {adapter!r}: no LoRA layer holds it; "
            f"there are {sorted(peft_model_of(model).peft_config)}"
        )
    for name, layer in layers.items():
        variant = layer.lora_variant.get(adapter)
        if variant is not None and not isinstance(variant, BothVariant):
            raise AdapterError(
                f"adapter {adapter!r}: layer {name} is a {type(variant).__name__}, not plain LoRA; "
                "convert it first"
            )
    return layers


def form_of(model: nn.Module, adapter: str = "default") -> Form:
    """The form that an adapter is held in; the same in all its layers.

    Raises:
        AdapterError: Somebody else's adapter that freezes tensors which no form here freezes.
    """
    layer = next(iter(adapted_layers(model, adapter).values()))
    if isinstance(layer.lora_variant.get(adapter), BothVariant):
        return FORMS["both"]
    frozen = tuple(layer.frozen_peft_weight_names.get(adapter, ()))
    for form in FORMS.values():
        if form.name != "both" and form.frozen == frozen:
            return form
    raise AdapterError(
        f"adapter {adapter!r}: expected none, lora_A or lora_B frozen, got {', '.join(frozen)}; "
        "train it with the library that made it"
    )


def freezes_a(layer: LoraLayer, adapter: str = "default") -> bool:
    """Whether A of a layer is frozen while this adapter trains, so that its row space stays."""
    return tuple(layer.frozen_peft_weight_names.get(adapter, ())) == TrainsB.frozen


def down_projection(layer: LoraLayer, adapter: str = "default") -> Tensor:
    """The A (R, D) that a layer reads its input through, float32 or wider.

    For the form `both` this is A0 + a, as in the papers' residual form: the row space of the
    exported [a; A0] would count a deviation of any size, however small, as much as A0.
    """
    a_RD = _form_of_layer(layer, adapter).down_projection(layer, adapter)
    return a_RD.to(torch.promote_types(a_RD.dtype, torch.float32))


def _form_of_layer(layer: LoraLayer, adapter: str) -> Form:
    """`both`, or one that holds ΔW = B A as it stands."""
    return FORMS["both" if isinstance(layer.lora_variant.get(adapter), BothVariant) else "plain"]


def factors(layer: LoraLayer, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """Exact factors of a layer's update, scale folded in: ΔW = B A.

    Returns:
        A (R, D) and B (O, R), float32 or wider; R is twice the rank for the form `both`.
    """
    a_RD, b_OR = live_factors(layer, adapter)
    return a_RD.detach(), b_OR.detach()


def live_factors(layer: LoraLayer, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """`factors` with gradients to what trains, for terms of a loss."""
    a_RD, b_OR = _form_of_layer(layer, adapter).deviation(layer, adapter)
    dtype = torch.promote_types(a_RD.dtype, torch.float32)
    return a_RD.to(dtype), b_OR.to(dtype) * layer.scaling[adapter]


def align_adapter_dtype(model: nn.Module, adapter: str = "default") -> None:
    """Give all tensors of an adapter the dtype of its trainable ones.

    TRL casts only trainable parameters, and only those of quantised models; a frozen side left in
    another dtype would mix dtypes outside autocast.
    """
    for layer in adapted_layers(model, adapter).values():
        tensors = [
            getattr(layer, name)[adapter].weight
            for name in ("lora_A", "lora_B", FIXED_A, FIXED_B)
            if name in layer.adapter_layer_names and adapter in getattr(layer, name)
        ]
        trainable = next((t for t in tensors if t.requires_grad), tensors[0])
        for tensor in tensors:
            tensor.data = tensor.data.to(trainable.dtype)
