"""The folder of one run: what lies where, whose it is, and how long each phase has taken so far."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from forgetless.atomic import write_atomically
from forgetless.errors import RecipeError
from forgetless.recipe import Recipe

# What may change between a run and its resumption: it changes no figure.
_FREE = frozenset(
    {
        "output",
        "calibration.batch_size",
        "calibration.cache",
        "training.save_steps",
        "training.logging_steps",
        "training.report_to",
    }
)
_BANK_SECONDS = 5.0


class RunFolder:
    """Paths inside the output folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.state = path / "state.json"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.record = path / "record.json"
        self.report = path / "report.html"

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's, or find that it is already.

        Raises:
            RecipeError: It is another recipe's (the message names the keys), or holds other files.
        """
        mine = plain_recipe(recipe)
        if self.recipe.exists():
            differing = self._differing(mine)
            if differing:
                raise RecipeError(
                    f"output {self.path}: expected an empty folder or one of this recipe, got one "
                    f"that differs in {'; '.join(differing)}; set output= to another folder, or "
                    "remove this one"
                )
        elif self.path.exists() and any(p.suffix != ".tmp" for p in _entries(self.path)):
            raise RecipeError(
                f"output {self.path}: expected an empty folder or one of a run, got "
                f"{'a file' if self.path.is_file() else 'other files'}; set output= to another "
                "folder"
            )
        text = yaml.safe_dump(mine, sort_keys=False, allow_unicode=True)
        write_atomically(self.recipe, text)

    def _differing(self, mine: Mapping[str, Any]) -> list[str]:
        try:
            found = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict):
            return ["all keys (its recipe.yaml cannot be read)"]
        theirs, ours = _flat(found), _flat(mine)
        return [
            f"{key} ({_shown(theirs, key)} there, {_shown(ours, key)} here)"
            for key in dict.fromkeys([*ours, *theirs])
            if key not in _FREE and theirs.get(key) != ours.get(key)
        ]


class Clock:
    """Seconds of each phase, kept on disk, so that a resumed run counts what went before.

    Attributes:
        phases: Seconds by phase, over all attempts.
        created: When the first attempt began, ISO 8601, UTC.
    """

    def __init__(self, path: Path) -> None:
        """Go on from the file where there is one; a damaged one is only a loss of timings."""
        self._path = path
        self.phases: dict[str, float] = {}
        self.created = datetime.now(UTC).isoformat(timespec="seconds")
        self._phase, self._since = "", 0.0
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.phases = {str(k): float(v) for k, v in stored["phases"].items()}
            self.created = str(stored["created"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            self.phases = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time, also where it ends in an error."""
        self._phase, self._since = name, time.perf_counter()
        try:
            yield
        finally:
            self._bank()

    def tick(self) -> None:
        """Note the time from within a phase, now and then: a kill then loses seconds only."""
        if self._phase and time.perf_counter() - self._since > _BANK_SECONDS:
            self._bank()

    def _bank(self) -> None:
        now = time.perf_counter()
        self.phases[self._phase] = self.phases.get(self._phase, 0.0) + now - self._since
        self._since = now
        content = {"created": self.created, "phases": self.phases}
        write_atomically(self._path, json.dumps(content, indent=1) + "\n")


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values; rows that were given in Python are described."""
    dumped = recipe.model_dump(mode="json", by_alias=True, fallback=repr)
    # Once through JSON: what is compared must be what a file can hold.
    resolved: dict[str, Any] = json.loads(json.dumps(dumped))
    return resolved


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else [path]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Leaves by dotted key; lists by number, so that the one differing entry can be named."""
    if isinstance(value, dict):
        pairs = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(str(index), entry) for index, entry in enumerate(value)]
    else:
        return {prefix: value}
    if prefix in _FREE:
        return {}
    leaves: dict[str, object] = {}
    for key, entry in pairs:
        leaves |= _flat(entry, f"{prefix}.{key}" if prefix else key)
    return leaves


def _shown(flat: Mapping[str, object], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "not set"
