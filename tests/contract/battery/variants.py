"""Every method in every form and mode, read off METHODS: a new one is in the battery unasked.

One option is changed at a time, and pairs where two of them meet in the code. What all methods
share (`alpha`, `rslora`) is tried once a form.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from forgetless.methods import METHODS
from forgetless.methods.base import Method, Trains

SHARED = frozenset(field.name for field in fields(Method))
# Values to try of options that are numbers. Choices of words, and of true and false, need no entry.
NUMBERS: dict[tuple[str, str], tuple[float, ...]] = {
    ("sc-lora", "beta"): (0, 1),  # each end needs one kind of data only
    ("corda", "damping"): (0,),
    ("contrastive", "epsilon"): (0.1,),
    ("lora-ga", "gamma"): (4,),
    ("lora-ga", "gradient_rows"): (3,),
}
PAIRS: dict[str, tuple[dict[str, Any], ...]] = {
    "sc-lora": (
        {"trains": "a", "beta": "auto"},
        {"trains": "a", "beta": 0.95, "negative": "drop"},
    ),
}
SCALE: tuple[tuple[str, Any], ...] = (("alpha", 6.0), ("rslora", True))


@dataclass(frozen=True, slots=True)
class Variant:
    """A method and the options that are not at their defaults."""

    kind: type[Method]
    changes: tuple[tuple[str, Any], ...] = ()

    def made(self, rank: int) -> Method:
        """The method itself."""
        return self.kind(rank=rank, **dict(self.changes))

    @property
    def form(self) -> Trains:
        """Which form holds it."""
        return self.made(1).form

    def __str__(self) -> str:
        return "-".join([self.kind.name, *(f"{key}={value}" for key, value in self.changes)])


def choices(kind: type[Method]) -> Iterator[tuple[str, Any]]:
    """Options of a method and their values besides the default."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.name not in SHARED:
            values = (*_words(hints[field.name]), *NUMBERS.get((kind.name, field.name), ()))
            yield from ((field.name, value) for value in values if value != field.default)


def _words(hint: Any) -> tuple[Any, ...]:
    """What a type says of its values, where they can be counted."""
    if hint is bool:
        return (False, True)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(value for part in get_args(hint) for value in _words(part))
    return ()


def variants_of(methods: Mapping[str, type[Method]]) -> list[Variant]:
    """All that the battery tries."""
    found: list[Variant] = []
    for name, kind in methods.items():
        found.append(Variant(kind))
        found += [Variant(kind, (choice,)) for choice in choices(kind)]
        found += [Variant(kind, tuple(pair.items())) for pair in PAIRS.get(name, ())]
    return found + one_of_each_form(found)


def one_of_each_form(variants: list[Variant]) -> list[Variant]:
    """With a scale other than 1: what holds of a form, whatever the method put into it."""
    first: dict[Trains, Variant] = {}
    for variant in variants:
        first.setdefault(variant.form, variant)
    return [Variant(v.kind, (*v.changes, *SCALE)) for v in first.values()]


VARIANTS = variants_of(METHODS)
SCALED = [variant for variant in VARIANTS if variant.changes[-len(SCALE) :] == SCALE]
