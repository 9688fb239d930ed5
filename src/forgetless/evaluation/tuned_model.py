"""What is measured: a PeftModel, an adapter folder on its base, or a tuned model beside one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from forgetless.adapters.load import load_adapter
from forgetless.adapters.scale import scaled_adapter
from forgetless.errors import AdapterError
from forgetless.models.pair import TunedModel, TunedPair
from forgetless.models.state import left_as_found


@contextmanager
def opened(
    model: PeftModel | PreTrainedModel | TunedPair,
    adapter: Path | str | None,
    base: PreTrainedModel | None,
) -> Iterator[TunedModel]:
    """The tuned model, as `evaluate` was given it; an adapter from a folder is taken off again.

    Raises:
        AdapterError: Two of `adapter`, `base` and a PeftModel, or none of them.
        ModelError: A base that the model cannot have been tuned from.
    """
    _refuse_two_bases(model, adapter, base)
    if isinstance(model, PeftModel | TunedPair):
        yield model
    elif base is not None:
        with left_as_found(base):
            yield TunedPair(model, base)
    elif adapter is not None:
        on_base = load_adapter(model, adapter)
        try:
            yield on_base
        finally:
            on_base.unload()
    else:
        raise AdapterError(
            f"evaluation: expected a PeftModel, got {type(model).__name__}; pass adapter=FOLDER "
            "with a bare base model, or base= with a model that was tuned in full"
        )


def _refuse_two_bases(
    model: object, adapter: Path | str | None, base: PreTrainedModel | None
) -> None:
    if adapter is not None and base is not None:
        raise AdapterError(
            f"evaluation: expected adapter= or base=, got both (adapter={str(adapter)!r}); with "
            "adapter=, the model itself is the base"
        )
    if not isinstance(model, PeftModel | TunedPair):
        if base is not None and not isinstance(base, PreTrainedModel):
            raise AdapterError(
                f"evaluation: expected a transformers model as base=, got {type(base).__name__}; "
                "load it with AutoModelForCausalLM"
            )
        return
    if adapter is not None:
        raise AdapterError(
            f"evaluation: expected a bare base model with adapter={str(adapter)!r}, got a "
            "PeftModel; pass one of the two"
        )
    if base is not None:
        raise AdapterError(
            "evaluation: expected a model without adapters with base=, got a PeftModel, which has "
            "its base in it; leave base= out, or merge_and_unload() the adapter first"
        )


def scaled(model: TunedModel, factor: float, adapter: str) -> AbstractContextManager[None]:
    """Inside the block the change is multiplied by `factor`."""
    if isinstance(model, TunedPair):
        return model.scaled(factor)
    return scaled_adapter(model, factor, adapter)


def active_adapter(model: TunedModel) -> str:
    """Name of the one adapter that is on; empty for a pair.

    Raises:
        AdapterError: Several adapters, none, a merged one, or one that is no weight of the model.
    """
    if isinstance(model, TunedPair):
        return ""
    active = list(model.active_adapters)
    if len(active) != 1:
        raise AdapterError(
            f"evaluation: expected one active adapter, got {active}; choose one with set_adapter"
        )
    if model.peft_config[active[0]].is_prompt_learning:
        raise AdapterError(
            "evaluation: expected an adapter of weights, got "
            f"{model.peft_config[active[0]].peft_type.value}, which adds positions to the prompt; "
            "only adapters such as LoRA can be measured"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (layer.merged or layer.disable_adapters):
            state = "merged into the base" if layer.merged else "disabled"
            remedy = "unmerge_adapter()" if layer.merged else "enable_adapter_layers()"
            raise AdapterError(
                f"evaluation: expected adapter {active[0]!r} beside the base, got it {state} at "
                f"layer {name}; call model.{remedy} first"
            )
    return str(active[0])
