"""What a plain LoRA, B A on linear layers of an untouched base, cannot hold: refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from forgetless.adapters.variant import LIVE_BOTH
from forgetless.errors import AdapterError
from forgetless.models.targets import base_of

# Starts that leave the base as it is; all others of PEFT subtract their start from its weights.
KEEPS_BASE: frozenset[bool | str | None] = frozenset(
    {True, False, None, "gaussian", "eva", "orthogonal", "mica", LIVE_BOTH}
)
# Options that put something beside B A: what that is, and what to train in its place.
BESIDE = {
    "modules_to_save": ("modules that were trained in full", "train without modules_to_save"),
    "lora_bias": ("a bias in LoRA's B", "train with lora_bias=False"),
    "use_dora": (
        "DoRA",
        "train with use_dora=False, or merge it with PEFT's merge_and_unload()",
    ),
    "trainable_token_indices": (
        "trained token embeddings",
        "train without trainable_token_indices",
    ),
    "target_parameters": ("LoRA on bare parameters", "name linear layers in target_modules"),
    "layer_replication": (
        "replicated layers",
        "save the replicated model as a base of its own, and train on that",
    ),
    "use_qalora": ("QA-LoRA", "train without use_qalora"),
}


def refuse_changed_base(where: str, init: Any) -> None:
    """Refuse factors that count from a base which the adapter's own start has changed.

    Args:
        where: Begins the message.
        init: The adapter's `init_lora_weights`.

    Raises:
        AdapterError: PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, or a start that is not known.
    """
    if not isinstance(init, bool | str | None) or init not in KEEPS_BASE:
        raise AdapterError(
            f"{where}: expected an adapter of the untouched base, got init_lora_weights={init!r}, "
            "which changes the base; save it again with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def beyond_plain_lora(config: Mapping[str, Any]) -> list[str]:
    """Options of an adapter's configuration that a plain LoRA cannot hold, as `name=value`."""
    found = [name for name in BESIDE if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or init not in KEEPS_BASE:
        found.append("init_lora_weights")
    return [f"{name}={config[name]!r}" for name in found]


def refuse_what_plain_lora_cannot_hold(model: PeftModel, adapter: str = "default") -> None:
    """Refuse an adapter of which an export, a merge or a scale would drop or miss a part.

    Raises:
        AdapterError: Names the part and what to do.
    """
    where = f"adapter {adapter!r}"
    if adapter not in model.peft_config:
        raise AdapterError(f"{where}: expected one of {sorted(model.peft_config)}; check the name")
    config = model.peft_config[adapter].to_dict()
    for option, (_, remedy) in BESIDE.items():
        if config.get(option):
            raise AdapterError(
                f"{where}: expected plain LoRA, got {option}={config[option]!r}, which a plain "
                f"LoRA cannot hold; {remedy}"
            )
    bias = config.get("bias")
    if bias != "none":
        raise AdapterError(
            f"{where}: expected plain LoRA, got trained biases of the base (bias={bias!r}); "
            "train with bias='none'"
        )
    refuse_changed_base(where, config.get("init_lora_weights"))
    _refuse_layers(model, adapter, where)


def _refuse_layers(model: PeftModel, adapter: str, where: str) -> None:
    base = base_of(model)
    head = _base_layer(base.get_output_embeddings())
    for name, layer in base.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if adapter in layer.lora_embedding_A:
            raise AdapterError(
                f"{where}: expected LoRA on linear layers, got the embedding {name}; leave it out "
                "of target_modules"
            )
        if adapter not in layer.lora_A:
            continue
        if layer.get_base_layer() is head:
            raise AdapterError(
                f"{where}: expected none on the output head, got one on {name}; leave it out of "
                "target_modules: servers ignore it, and a tied embedding would change with it"
            )
        if layer.lora_A[adapter].weight.ndim != 2:
            raise AdapterError(
                f"{where}: expected LoRA on linear layers, got the convolution {name}; leave it "
                "out of target_modules"
            )
        if layer.merged_adapters:
            raise AdapterError(
                f"{where}: expected an unmerged model, got {layer.merged_adapters} merged into "
                f"{name}; call unmerge_adapter() first"
            )


def _base_layer(module: nn.Module | None) -> nn.Module | None:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
