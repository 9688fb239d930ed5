"""The cells of a sweep: which keys each sets, to what, and what to call it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.data.validation import shortened
from forgetless.experiments.sweep.spec import SweepSpec
from forgetless.recipe import give_options_a_place
from forgetless.recipe_yaml import set_value

_SHORT = {"training.learning_rate": "lr", "training.weight_decay": "wd"}


@dataclass(frozen=True)
class Cell:
    """One combination of values.

    Attributes:
        values: By recipe key, as overrides write it.
    """

    values: Mapping[str, Any]

    def tree(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The base recipe's keys with this cell's values.

        Raises:
            RecipeError: A key that has no place there.
        """
        tree = deepcopy(dict(base))
        give_options_a_place(tree)
        # A part before what is in it: `method` and then `method.rank`, however they are listed.
        for key in sorted(self.values, key=lambda key: key.count(".")):
            set_value(tree, key.split("."), deepcopy(self.values[key]), f"key {key!r}")
            give_options_a_place(tree)
        return tree

    def __str__(self) -> str:
        """`method lora, training.learning_rate 0.001`, for messages."""
        return ", ".join(f"{key} {_in_words(value)}" for key, value in self.values.items())

    def label(self, base: str) -> str:
        """`sc-lora, beta 0.8, lr 0.001, seed 1`, for tables and reports.

        Args:
            base: What to call it where the cell sets no method.
        """
        method = self.values.get("method")
        named = [_in_words(method) if "method" in self.values else base]
        for key, value in self.values.items():
            if key == "training.regularisers":
                named += [f"+ {_in_words(value)}"] if value else []
            elif key in ("train_data", "preserve_data"):
                named.append(f"{key.removesuffix('_data')}: {_sources(value)}")
            elif key != "method":
                named.append(f"{_SHORT.get(key, key.rpartition('.')[2])} {_in_words(value)}")
        return ", ".join(named).replace(", + ", " + ")


def cells_of(spec: SweepSpec) -> list[Cell]:
    """All combinations of the grid, then those of each entry of `runs`, in their order."""
    grids = [spec.grid] if spec.grid else []
    grids += [
        {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
        for entry in spec.runs
    ]
    return [Cell(values) for grid in grids for values in _combinations(grid)]


def _combinations(grid: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _sources(value: object) -> str:
    """`self and manual`: sources of data by the names of their files."""
    if isinstance(value, list):
        return " and ".join(map(_sources, value)) or "none"
    if isinstance(value, Mapping):
        name = value.get("path") or value.get("hub") or ("self" if value.get("self") else "rows")
        return Path(str(name)).stem if value.get("path") else str(name)
    return Path(value).stem if isinstance(value, str) else _in_words(value)


def _in_words(value: object) -> str:
    """A value as a reader would say it: `sc-lora beta 0.8` for a mapping of name and options."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        options = [f"{key} {_in_words(part)}" for key, part in value.items() if key != "name"]
        return " ".join([*([str(value["name"])] if "name" in value else []), *options])
    if isinstance(value, list):
        return " + ".join(map(_in_words, value)) or "none"
    return value if isinstance(value, str) else shortened(value)
