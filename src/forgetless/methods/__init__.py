"""One paper, one file; `METHODS` lists them, and `make_method` builds one from a recipe."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from forgetless.errors import MethodError
from forgetless.methods.astra import Astra
from forgetless.methods.base import Method
from forgetless.methods.contrastive import ContrastiveBasis
from forgetless.methods.corda import CorDA
from forgetless.methods.eva import EVA
from forgetless.methods.lora import LoRA, LoRAWeightDecay
from forgetless.methods.lora_null import LoRANull
from forgetless.methods.mica import MiCA
from forgetless.methods.milora import MiLoRA
from forgetless.methods.olora import OLoRA
from forgetless.methods.pissa import PiSSA
from forgetless.methods.sc_lora import SCLoRA

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
        ContrastiveBasis,
    )
}

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
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise MethodError(
            f"method: expected one of {', '.join(METHODS)}, got {name!r}{_nearest(name, METHODS)}"
        )
    if rank is not None and options.setdefault("rank", rank) != rank:
        raise MethodError(f"rank: given twice, as {options['rank']} and as {rank}; give it once")
    kind = METHODS[name]
    known = get_type_hints(kind)
    known = {field.name: known[field.name] for field in fields(kind)}
    for key, value in options.items():
        if key not in known:
            raise MethodError(
                f"method {name}: unknown option {key!r}{_nearest(key, known)}; "
                f"known: {', '.join(known)}"
            )
        _check_type(name, key, value, known[key])
    return kind(**options)


def method_options(method: Method) -> dict[str, Any]:
    """Name and all options, as `make_method` takes them."""
    return {"name": method.name} | {f.name: getattr(method, f.name) for f in fields(method)}


def _check_type(method: str, key: str, value: object, declared: Any) -> None:
    """Numbers where numbers belong: YAML reads `1e-3x` as text."""
    kinds = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    if not any(_is(value, kind) for kind in kinds):
        expected = " or ".join(words for kind in kinds if (words := _in_words(kind)))
        raise MethodError(f"method {method}: {key}: expected {expected}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise MethodError(f"method {method}: {key}: expected a finite number, got {value}")


def _is(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, "")


def _nearest(name: object, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
