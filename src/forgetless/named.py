"""One of several kinds by its name, with options: as a recipe or a caller writes it.

Kinds are frozen dataclasses of options with a class attribute `name`.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from forgetless.errors import ForgetlessError


class Named(Protocol):
    """What has a name and is a dataclass."""

    @property
    def name(self) -> str:
        """As recipes call it."""


Kind = TypeVar("Kind", bound=Named)


def make_named(
    given: str | Mapping[str, Any],
    kinds: Mapping[str, type[Kind]],
    *,
    what: str,
    error: type[ForgetlessError],
) -> Kind:
    """Build one of `kinds` from a name, or from a mapping of its name and options.

    Args:
        given: `"sc-lora"`, or `{"name": "sc-lora", "beta": 0.8}`.
        kinds: By name.
        what: Begins the messages: `method`.
        error: Raised for a mistake: an unknown name or option (the nearest known one is named), a
            value of another type, a number that is not finite; or what the class itself raises.
    """
    options: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise error(
            f"{what}: expected one of {', '.join(kinds)}, got {name!r}{_nearest(name, kinds)}"
        )
    hints = get_type_hints(kinds[name])
    known = {field.name: hints[field.name] for field in fields(kinds[name])}  # type: ignore[arg-type]
    for key, value in options.items():
        if key not in known:
            raise error(
                f"{what} {name}: unknown option {key!r}{_nearest(key, known)}; "
                f"known: {', '.join(known)}"
            )
        wrong = _wrong_type(value, known[key])
        if wrong:
            raise error(f"{what} {name}: {key}: {wrong}")
    return kinds[name](**options)


def options_of(made: Named) -> dict[str, Any]:
    """Name and all options, as `make_named` takes them."""
    return {"name": made.name} | {f.name: getattr(made, f.name) for f in fields(made)}  # type: ignore[arg-type]


def _wrong_type(value: object, declared: Any) -> str:
    """Numbers where numbers belong: YAML reads `1e-3x` as text."""
    kinds = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    if not any(_is(value, kind) for kind in kinds):
        expected = " or ".join(words for kind in kinds if (words := _in_words(kind)))
        return f"expected {expected}, got {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, got {value}"
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return f"expected a number of at most {sys.float_info.max:g}, got a larger one"
    return ""


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
