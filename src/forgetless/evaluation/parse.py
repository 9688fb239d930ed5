"""From whatever names held-out data to evaluation items, with the default metrics of each side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import DatasetDict

from forgetless.data.spec import DataInput, DataSpec, parse_data
from forgetless.data.validation import validated
from forgetless.errors import RecipeError
from forgetless.evaluation.items import EvaluationItem, Metric
from forgetless.evaluation.results import Side

ItemInput = EvaluationItem | DataInput
DEFAULT_METRICS: dict[Side, tuple[Metric, ...]] = {"gain": ("nll",), "retention": ("nll", "kl")}


def parse_items(
    gain: Sequence[ItemInput] = (), retention: Sequence[ItemInput] = ()
) -> list[tuple[Side, EvaluationItem]]:
    """Turn the two lists of `evaluate` into items.

    An entry is an `EvaluationItem`, its keys as a mapping, or anything that names data. A name that
    is not given is the data's label, numbered where it repeats; metrics that are not given are
    `nll`, and for retention also `kl`.

    Raises:
        RecipeError: An unknown key, values that do not fit together, or two items of one name.
        DataError: An entry that names no data.
    """
    sides: tuple[tuple[Side, Sequence[ItemInput]], ...] = (("gain", gain), ("retention", retention))
    found: list[tuple[Side, EvaluationItem]] = []
    names: set[str] = set()
    for side, entries in sides:
        if isinstance(entries, str | Mapping | DataSpec) or not isinstance(entries, Sequence):
            raise RecipeError(
                f"{side}: expected a list of evaluation items, got one {type(entries).__name__}; "
                f"put it in a list"
            )
        for index, entry in enumerate(entries):
            for item, is_named in _parse_entry(entry, side, f"{side}.{index}"):
                unique = item if is_named else _numbered(item, names)
                if unique.name in names:
                    raise RecipeError(
                        f"{side}.{index}: expected a name of its own, got {unique.name!r} a second "
                        "time; rename one of the two items"
                    )
                names.add(unique.name)
                found.append((side, unique))
    return found


def _parse_entry(entry: ItemInput, side: Side, where: str) -> list[tuple[EvaluationItem, bool]]:
    """Items of one entry, and whether the name was given."""
    if isinstance(entry, EvaluationItem):
        return [(entry, True)]
    # A DatasetDict is a mapping too, of splits.
    if isinstance(entry, Mapping) and not isinstance(entry, DatasetDict):
        return [(_from_mapping(entry, side, where), "name" in entry)]
    return [(_from_spec(spec, side), False) for spec in parse_data(entry, where=where)]


def _from_mapping(entry: Mapping[str, Any], side: Side, where: str) -> EvaluationItem:
    defaults: dict[str, Any] = {"metrics": DEFAULT_METRICS[side], "name": ""}
    item = validated(EvaluationItem, {**defaults, **entry}, where)
    return item if "name" in entry else item.model_copy(update={"name": item.label})


def _from_spec(spec: DataSpec, side: Side) -> EvaluationItem:
    keys = {name: getattr(spec, name) for name in spec.model_fields_set}
    return EvaluationItem(**keys, name=spec.label, metrics=DEFAULT_METRICS[side])


def _numbered(item: EvaluationItem, names: set[str]) -> EvaluationItem:
    name, number = item.name, 2
    while name in names:
        name, number = f"{item.name} ({number})", number + 1
    return item.model_copy(update={"name": name})
