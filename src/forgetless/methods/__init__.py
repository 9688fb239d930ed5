"""One paper, one file; `METHODS` lists them, and `make_method` builds one from a recipe."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from forgetless.errors import MethodError
from forgetless.methods.base import Method
from forgetless.methods.lora import LoRA, LoRAWeightDecay
from forgetless.methods.lora_null import LoRANull
from forgetless.methods.sc_lora import SCLoRA

METHODS: dict[str, type[Method]] = {
    LoRA.name: LoRA,
    LoRAWeightDecay.name: LoRAWeightDecay,
    LoRANull.name: LoRANull,
    SCLoRA.name: SCLoRA,
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
    known = {field.name: field.type for field in fields(kind)}
    for key, value in options.items():
        if key not in known:
            raise MethodError(
                f"method {name}: unknown option {key!r}{_nearest(key, known)}; "
                f"known: {', '.join(known)}"
            )
        _check_type(name, key, value, str(known[key]))
    return kind(**options)


def method_options(method: Method) -> dict[str, Any]:
    """Name and all options, as `make_method` takes them."""
    return {"name": method.name} | {f.name: getattr(method, f.name) for f in fields(method)}


def _check_type(method: str, key: str, value: object, declared: str) -> None:
    """Numbers where numbers belong: YAML reads `1e-3x` as text."""
    expected: tuple[type, ...] = {"int": (int,), "float": (int, float)}.get(declared, (object,))
    if declared == "float | None":
        expected = (int, float, type(None))
    if not isinstance(value, expected) or (isinstance(value, bool) and expected != (object,)):
        kind = "a whole number" if declared == "int" else "a number"
        raise MethodError(f"method {method}: {key}: expected {kind}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise MethodError(f"method {method}: {key}: expected a finite number, got {value}")


def _nearest(name: object, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
