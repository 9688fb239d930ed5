"""Arms of a comparison: runs that differ in learning rate and seed alone are one method."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from forgetless.data.validation import shortened
from forgetless.errors import ArtefactError
from forgetless.escaping import one_line
from forgetless.experiments.output import completed, is_free, leaves
from forgetless.experiments.record import Record
from forgetless.experiments.runs import beyond_the_loss
from forgetless.methods import ALL_METHODS
from forgetless.named import Named
from forgetless.training.regularisers import REGULARISERS

# What an arm's runs may differ in, beside what changes no adapter; the rest makes another arm.
_NOT_OF_AN_ARM = frozenset({"seed", "training.learning_rate"})
_SHORT = {"training.weight_decay": "wd", "training.lora_plus_ratio": "LoRA+"}


@dataclass(frozen=True)
class Cell:
    """The runs of one arm at one learning rate, by seed."""

    rate: float
    records: tuple[Record, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """In ascending order."""
        return tuple(record.seed for record in self.records)

    def validation_nll(self, seeds: frozenset[int]) -> float | None:
        """Mean over these seeds; None where a run kept no rows for validation."""
        found = [r.training.validation_nll for r in self.records if r.seed in seeds]
        known = [nll for nll in found if nll is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None


@dataclass(frozen=True)
class Arm:
    """A method with its options and regularisers, at every rate and seed that was run.

    Attributes:
        name: Unique in the comparison.
        cells: By rate, ascending.
        decay: Weight decay where the arm is plain LoRA but for that; None for all others.
    """

    name: str
    cells: tuple[Cell, ...]
    decay: float | None

    @property
    def is_lora(self) -> bool:
        """Whether it is plain LoRA, without decay."""
        return self.decay == 0

    def chosen(self) -> Cell | None:
        """The cell of the best rate: least NLL on rows held out of training for that.

        Rates are compared on the seeds that all of them have, so that none wins by having been run
        more often. With one rate there is nothing to choose. Never by evaluation rows: None where
        there are several rates and a run kept no rows for validation.
        """
        if len(self.cells) == 1:
            return self.cells[0]
        shared = frozenset.intersection(*(frozenset(cell.seeds) for cell in self.cells))
        scores = [cell.validation_nll(shared or frozenset(cell.seeds)) for cell in self.cells]
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            return None
        return min(zip(known, self.cells, strict=True), key=lambda pair: _ranked(pair[0]))[1]


def _ranked(nll: float) -> float:
    """A run that diverged is the worst."""
    return nll if math.isfinite(nll) else math.inf


def arms_of(records: Sequence[Record]) -> list[Arm]:
    """Group records, in the order in which their arms are first met; plain LoRA goes first.

    Raises:
        ArtefactError: Two records of one arm, rate and seed with different figures.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_key(record), []).append(record)
    names = _names([found[0] for found in groups.values()])
    arms = [
        Arm(name, tuple(_cells(name, found)), _decay_of_lora(found[0]))
        for name, found in zip(names, groups.values(), strict=True)
    ]
    return sorted(arms, key=lambda arm: not arm.is_lora)


def has_several_runs(records: Sequence[Record]) -> bool:
    """Whether a method stands there at several rates, or with several seeds."""
    arms = {_key(record) for record in records}
    runs = {(_key(r), r.training.learning_rate, r.seed) for r in records}
    return len(arms) < len(runs)


def _key(record: Record) -> str:
    return json.dumps(_settings(record), sort_keys=True, default=str)


def _cells(name: str, records: Sequence[Record]) -> list[Cell]:
    by_rate: dict[float, dict[int, Record]] = defaultdict(dict)
    for record in records:
        cell = by_rate[record.training.learning_rate]
        first = cell.setdefault(record.seed, record)
        if _measured(first) != _measured(record):
            raise ArtefactError(
                f"report: expected one record of {name} at rate "
                f"{record.training.learning_rate:g} with seed {record.seed}, got two whose figures "
                f"differ ({first.recipe.get('output')}, {record.recipe.get('output')}); leave one "
                "out"
            )
    return [
        Cell(rate, tuple(by_rate[rate][seed] for seed in sorted(by_rate[rate])))
        for rate in sorted(by_rate)
    ]


def _measured(record: Record) -> list[dict[str, Any]]:
    """Figures that two runs of one recipe have alike."""
    reports = (record.evaluation, *record.scaled)
    return [{item.name: item.metrics for item in report.items} for report in reports]


def _settings(record: Record) -> dict[str, Any]:
    """What makes an arm, by dotted key, with defaults filled in where they say the same."""
    recipe = completed(json.loads(json.dumps(record.recipe, default=str)))
    flat = {
        key: value
        for key, value in leaves(recipe).items()
        if key not in _NOT_OF_AN_ARM and not is_free(key) and not key.startswith("method")
    }
    flat["method"] = {**record.method, "name": _named(record)}
    flat["training.weight_decay"] = _decay(record)
    return flat


def _named(record: Record) -> str:
    """`lora-wd` is LoRA with a decay; which is told apart by the decay."""
    name = str(record.method.get("name"))
    return "lora" if name == "lora-wd" else name


def _decay(record: Record) -> float:
    given = record.recipe.get("training", {}).get("weight_decay")
    if given is not None:
        return float(given)
    kind = ALL_METHODS.get(str(record.method.get("name")))
    return kind.default_weight_decay if kind else 0.0


def _decay_of_lora(record: Record) -> float | None:
    if _named(record) != "lora" or beyond_the_loss(record):
        return None
    return _decay(record)


def _names(records: Sequence[Record]) -> list[str]:
    """The method in words, and where arms share these, the settings in which they differ."""
    words = [_in_words(record) for record in records]
    settings = [_settings(record) for record in records]
    names = []
    for word, own in zip(words, settings, strict=True):
        alike = [s for w, s in zip(words, settings, strict=True) if w == word]
        keys = [key for key in own if any(s.get(key) != own[key] for s in alike)]
        keys += [key for s in alike for key in s if key not in own and key not in keys]
        told = ", ".join(_differences(own, dict.fromkeys(keys)))
        names.append(f"{word} ({told})" if told else word)
    return _unique(names, settings)


def _unique(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where words are still the same, with every key that differs, and at last with a number."""
    found: list[str] = []
    for name, own in zip(names, settings, strict=True):
        alike = [s for n, s in zip(names, settings, strict=True) if n == name]
        keys = dict.fromkeys(key for one in alike for key in one)
        differing = [key for key in keys if any(one.get(key) != own.get(key) for one in alike)]
        told = ", ".join(f"{key} {shortened(own.get(key))}" for key in differing)
        full = f"{name}, {told}" if told else name
        number = sum(other == full or other.startswith(f"{full} #") for other in found)
        found.append(f"{full} #{number + 1}" if number else full)
    return found


def _differences(own: Mapping[str, Any], keys: Mapping[str, None]) -> list[str]:
    """`rank 16`, `wd 0.1`; data by their sources, as a whole."""
    parts = []
    for key in keys:
        role = key.partition("_data")[0]
        if key.startswith(("preserve_data", "train_data")):
            parts.append(f"{role}: {_sources(own, f'{role}_data')}")
        elif key == "method":
            parts += [
                f"{k} {shortened(v)}" for k, v in sorted(own["method"].items()) if k != "name"
            ]
        else:
            parts.append(f"{_SHORT.get(key, key.rpartition('.')[2])} {shortened(own.get(key))}")
    return list(dict.fromkeys(parts))


def _sources(own: Mapping[str, Any], part: str) -> str:
    found = []
    for key, value in own.items():
        if key.startswith(part) and value:
            kind = key.rpartition(".")[2]
            if kind in ("path", "hub"):
                found.append(Path(str(value)).stem)
            elif kind in ("self", "self_sampled"):
                found.append("self")
            elif key == f"{part}.{kind}" and kind == "examples":
                found.append("rows")
    return one_line(" and ".join(dict.fromkeys(found)) or "none")


def _in_words(record: Record) -> str:
    """`sc-lora beta 0.5 + kl weight 2 wd 0.1`: only what is not the default."""
    method = {**record.method, "name": _named(record)}
    parts = [_with_options(method, ALL_METHODS)]
    parts += [_with_options(one, REGULARISERS) for one in beyond_the_loss(record)
              if isinstance(one, Mapping) and "name" in one]  # fmt: skip
    text = " + ".join(parts)
    decay = _decay(record)
    return f"{text} wd {decay:g}" if decay else text


def _with_options(options: Mapping[str, Any], kinds: Mapping[str, type[Named]]) -> str:
    kind = kinds.get(str(options["name"]))
    usual = {f.name: f.default for f in fields(kind)} if kind else {}  # type: ignore[arg-type]
    changed = [
        f"{key} {one_line(str(value))}"
        for key, value in options.items()
        if key not in ("name", "rank") and usual.get(key) != value
    ]
    return " ".join([one_line(str(options["name"])), *changed])
