"""A base model must be what it was: no live adapter outside a PeftModel, none merged into it."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from forgetless.errors import AdapterError


def refuse_touched_base(model: nn.Module) -> None:
    """Refuse a model whose base cannot be had by switching adapters off.

    PEFT puts its layers into the model that it is given, so that the variable of the bare model
    holds live adapters after `attach` or `get_peft_model`; and a merged adapter is part of the
    weights.

    Args:
        model: A transformers model, or a PeftModel around one.

    Raises:
        AdapterError: Adapter layers outside a PeftModel, or a merged adapter; the first is named.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(model, PeftModel):
            raise AdapterError(
                f"model: expected a base without adapters, got one at layer {name}, left by an "
                "earlier attach or get_peft_model; pass the PeftModel that it returned, or call "
                "unload() on that first"
            )
        if layer.merged_adapters:
            raise AdapterError(
                f"model: expected adapters beside the base, got {layer.merged_adapters[0]!r} "
                f"merged into layer {name}; call unmerge_adapter() first, or merge_and_unload() to "
                "make the merged model the base"
            )
