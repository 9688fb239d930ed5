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
from forgetless.training.checkpoint import latest_checkpoint

# What may change between a run and its resumption: it changes no figure.
_FREE = frozenset(
    {
        "output",
        "calibration.batch_size",
        "calibration.memory_budget",
        "calibration.cache",
        "training.save_steps",
        "training.logging_steps",
        "training.report_to",
    }
)
# What changes nothing but words in the report.
SHOWING = frozenset({"label", "claims"})
# What changes the figures, but not the adapter: a run that is trained is measured again.
_MEASURING = frozenset({"evaluation", *SHOWING})
# Keys that folders of earlier versions lack, by part, with what those versions did.
_ADDED: Mapping[str | None, Mapping[str, Any]] = {
    None: {"quantization": "none"},
    "calibration": {"source_weights": "tokens", "memory_budget": None},
    "training": {"lora_plus_ratio": None, "regularisers": []},
    "evaluation": {"lm_eval": None},
}
_ADDED_TO_ITEMS: Mapping[str, Any] = {
    "redistributable": True,
    "refuses_with": [],
    "complies_with": [],
}
_BANK_SECONDS = 5.0


class RunFolder:
    """Paths inside the output folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.state = path / "state.json"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.model = path / "model"  # in place of an adapter, where every weight trains
        self.record = path / "record.json"
        self.report = path / "report.html"

    def check(self, recipe: Recipe) -> None:
        """Refuse a folder that is somebody else's; nothing is written.

        A run that only differs in what is measured is the same. One that has left nothing but its
        recipe behind, because its input was wrong, gives the folder up.

        Raises:
            RecipeError: It is another recipe's (the message names the keys), or holds other files.
        """
        mine = plain_recipe(recipe)
        if self.recipe.exists():
            found = self._found()
            keys = differing(found, mine) if found else {"": "all keys (recipe.yaml is unreadable)"}
            others = [text for key, text in keys.items() if not _is_measuring(key)]
            if others and not self._given_up(found, mine):
                raise RecipeError(
                    f"output {self.path}: expected an empty folder or one of this recipe, got one "
                    f"that differs in {'; '.join(others)}; set output= to another folder, or "
                    "remove this one"
                )
        elif self.path.exists() and _names(self.path):
            raise RecipeError(
                f"output {self.path}: expected an empty folder or one of a run, got "
                f"{'a file' if self.path.is_file() else 'other files'}; set output= to another "
                "folder"
            )

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's, or find that it is already.

        Raises:
            RecipeError: As `check` does.
        """
        self.check(recipe)
        mine = plain_recipe(recipe)
        found = self._found()
        if found and self._given_up(found, mine) and differing(found, mine):
            self.state.unlink(missing_ok=True)
        write_atomically(self.recipe, yaml.safe_dump(mine, sort_keys=False, allow_unicode=True))

    def _found(self) -> dict[str, Any]:
        """The recipe that lies there; empty where there is none, or none that can be read."""
        try:
            found = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
            return {}
        return completed(found) if isinstance(found, dict) else {}

    def _given_up(self, found: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
        """Whether the folder holds a run's recipe and nothing that took time to make.

        A recipe that a user wrote into the folder lacks keys: those of a run are all there.
        """
        return (
            _names(self.path) <= {self.recipe.name, self.state.name, self.checkpoints.name}
            and latest_checkpoint(self.checkpoints) is None
            and found.keys() == mine.keys()
        )


def completed(found: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run of an earlier version, with the keys that came later, in place."""
    for part, added in _ADDED.items():
        place = found if part is None else found.get(part)
        if isinstance(place, dict):
            for key, value in added.items():
                place.setdefault(key, value)
    evaluation = found.get("evaluation")
    for side in ("gain", "retention"):
        for item in evaluation.get(side, ()) if isinstance(evaluation, dict) else ():
            if isinstance(item, dict):
                for key, value in _ADDED_TO_ITEMS.items():
                    item.setdefault(key, value)
    return found


class Clock:
    """Seconds of each phase, kept on disk, so that a resumed run counts what went before.

    Attributes:
        phases: Seconds by phase, over all attempts.
        processor: Seconds of processor time by phase, all threads: what else the machine does
            hardly counts.
        created: When the first attempt began, ISO 8601, UTC.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        """Go on from the file where there is one; a damaged one is only a loss of timings.

        One that does not write leaves the file to another process.
        """
        self._writes = writes
        self._path = path
        self.phases: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self.created = datetime.now(UTC).isoformat(timespec="seconds")
        self._phase, self._since, self._worked = "", 0.0, 0.0
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.phases = {str(k): float(v) for k, v in stored["phases"].items()}
            self.created = str(stored["created"])
            # Folders of earlier versions lack it: their record then holds none of what went before.
            self.processor = {str(k): float(v) for k, v in stored.get("processor", {}).items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            self.phases, self.processor = {}, {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time, also where it ends in an error."""
        self._phase = name
        self._since, self._worked = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._bank()

    def tick(self) -> None:
        """Note the time from within a phase, now and then: a kill then loses seconds only."""
        if self._phase and time.perf_counter() - self._since > _BANK_SECONDS:
            self._bank()

    def _bank(self) -> None:
        now, worked = time.perf_counter(), time.process_time()
        self.phases[self._phase] = self.phases.get(self._phase, 0.0) + now - self._since
        spent = self.processor.get(self._phase, 0.0) + worked - self._worked
        self.processor[self._phase] = spent
        self._since, self._worked = now, worked
        if not self._writes:
            return
        content = {"created": self.created, "phases": self.phases, "processor": self.processor}
        write_atomically(self._path, json.dumps(content, indent=1) + "\n")


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values; rows that were given in Python are described."""
    dumped = recipe.model_dump(mode="json", by_alias=True, fallback=repr)
    # Once through JSON: what is compared must be what a file can hold.
    resolved: dict[str, Any] = json.loads(json.dumps(dumped))
    return resolved


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """Keys in which two resolved recipes differ so that a figure does, each in words."""
    there, here = leaves(theirs), leaves(ours)
    return {
        key: f"{key} ({_shown(there, key)} there, {_shown(here, key)} here)"
        for key in dict.fromkeys([*here, *there])
        if key not in _FREE and there.get(key) != here.get(key)
    }


def is_free(key: str) -> bool:
    """Whether a dotted key says nothing of what is trained: only where, in which words, on what."""
    return key in _FREE or _is_measuring(key)


def _is_measuring(key: str) -> bool:
    return key.partition(".")[0] in _MEASURING


def _names(path: Path) -> set[str]:
    """What lies in a folder; a file holds itself. Half-written files do not count."""
    entries = path.iterdir() if path.is_dir() else [path]
    return {entry.name for entry in entries if entry.suffix != ".tmp"}


def leaves(value: object, prefix: str = "") -> dict[str, object]:
    """Leaves by dotted key; lists by number, so that the one differing entry can be named."""
    if isinstance(value, dict):
        pairs = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(str(index), entry) for index, entry in enumerate(value)]
    else:
        return {prefix: value}
    if prefix in _FREE:
        return {}
    found: dict[str, object] = {}
    for key, entry in pairs:
        found |= leaves(entry, f"{prefix}.{key}" if prefix else key)
    return found


def _shown(flat: Mapping[str, object], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "not set"
