"""One paper, one file; `METHODS` lists them, and `make_method` builds one from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forgetless.errors import MethodError
from forgetless.methods.astra import Astra
from forgetless.methods.base import AnyMethod, Method
from forgetless.methods.contrastive import ContrastiveBasis
from forgetless.methods.corda import CorDA
from forgetless.methods.eva import EVA
from forgetless.methods.full import FullFineTuning
from forgetless.methods.lora import LoRA, LoRAWeightDecay
from forgetless.methods.lora_ga import LoRAGA
from forgetless.methods.lora_null import LoRANull
from forgetless.methods.mica import MiCA
from forgetless.methods.milora import MiLoRA
from forgetless.methods.olora import OLoRA
from forgetless.methods.pissa import PiSSA
from forgetless.methods.sc_lora import SCLoRA
from forgetless.named import make_named, options_of

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        LoRA,
        LoRAWeightDecay,
        LoRANull,
        SCLoRA,
        PiSSA,
        MiLoRA,
        OLoRA,
        CorDA,
        EVA,
        MiCA,
        Astra,
        LoRAGA,
        ContrastiveBasis,
    )
}

# What a recipe may name: those that start an adapter, and what trains every weight.
ALL_METHODS: dict[str, type[AnyMethod]] = {**METHODS, FullFineTuning.name: FullFineTuning}

MethodInput = str | Mapping[str, Any] | Method


def make_method(method: MethodInput, rank: int | None = None) -> Method:
    """Build a method from its name, or from a mapping of its name and options.

    Args:
        method: `"lora-null"`, `{"name": "sc-lora", "beta": 0.8}`, or a ready method.
        rank: Shorthand for the option of that name; must not contradict it.

    Raises:
        MethodError: Unknown name or option (the nearest known one is named), or a value out of
            range.
    """
    if isinstance(method, Method):
        if rank is not None and rank != method.rank:
            raise MethodError(f"rank: expected {method.rank} as in the method given, got {rank!r}")
        return method
    options: dict[str, Any] = {"name": method} if isinstance(method, str) else dict(method)
    if options.get("name") == FullFineTuning.name:
        raise MethodError(
            f"method {FullFineTuning.name}: expected a method that starts an adapter, got one that "
            "trains every weight; put `method: full` into a recipe (forgetless run), or train a "
            "copy of the base in your own script and measure it with forgetless.evaluate(base=...)"
        )
    if rank is not None and options.setdefault("rank", rank) != rank:
        raise MethodError(f"rank: given twice, as {options['rank']} and as {rank}; give it once")
    return make_named(options, METHODS, what="method", error=MethodError)


def make_any_method(method: str | Mapping[str, Any]) -> AnyMethod:
    """Build what a recipe names: as `make_method`, or full fine-tuning.

    Raises:
        MethodError: As `make_method`.
    """
    return make_named(method, ALL_METHODS, what="method", error=MethodError)


def method_options(method: AnyMethod) -> dict[str, Any]:
    """Name and all options, as `make_method` takes them."""
    return options_of(method)
