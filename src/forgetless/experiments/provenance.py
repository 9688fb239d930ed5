"""How it was made: what all runs share once, what differs beside it, and each recipe in full."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from forgetless.experiments.numbers import MISSING, count_text, plain, seconds_text
from forgetless.experiments.runs import Run


@dataclass(frozen=True)
class Facts:
    """Facts by name: `shared` where all runs agree, `differing` with one value a run."""

    shared: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Making:
    """One run's own part: recipe as YAML text, data, what was skipped, what was warned of."""

    run: Run
    recipe: str
    data: tuple[tuple[str, ...], ...]
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def facts(runs: Sequence[Run]) -> Facts:
    """Seeds, model, versions, hardware, commit and phase times of all runs."""
    tables = [_facts_of(run) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    shared, differing = [], []
    for name in names:
        values = tuple(table.get(name, MISSING) for table in tables)
        if len(set(values)) == 1:
            shared.append((name, values[0]))
        else:
            differing.append((name, values))
    return Facts(tuple(shared), tuple(differing))


def phase_rows(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...]]]:
    """Seconds of every phase, one value a run, with the sum below."""
    names = list(dict.fromkeys(name for run in runs for name in run.record.phases))
    rows = [(name, tuple(_phase(run.record.phases, name) for run in runs)) for name in names]
    if len(names) > 1:
        total = tuple(seconds_text(sum(run.record.phases.values())) for run in runs)
        rows.append(("all phases", total))
    return rows


def making(run: Run) -> Making:
    """What belongs to one run alone."""
    record = run.record
    data = tuple(
        (
            d.role,
            d.source,
            d.fingerprint,
            count_text(d.rows),
            count_text(d.tokens),
            count_text(d.truncated_rows),
        )
        for d in record.data
    )
    return Making(
        run,
        recipe_text(record.recipe),
        data,
        tuple(record.skipped_layers.items()),
        tuple(record.warnings),
    )


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The resolved recipe as it would stand in a file; paths and the like become their text."""
    values = json.loads(json.dumps(dict(recipe), default=str))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=88).strip()


def _phase(phases: Mapping[str, float], name: str) -> str:
    return seconds_text(phases[name]) if name in phases else MISSING


def _facts_of(run: Run) -> dict[str, str]:
    record = run.record
    model, training = record.model, record.training
    found = {
        "base model": model.name,
        "revision": model.revision or MISSING,
        "fingerprint": model.fingerprint,
        "architecture": f"{model.architecture}, {count_text(model.parameters)} parameters",
        "runs on": f"{model.device}, {model.dtype}",
        "quantisation": model.quantization or "none",
        "made": record.created,
        "seed": str(record.seed),
        "method": ", ".join(f"{key} {value}" for key, value in record.method.items()),
        "learning rate": f"{training.learning_rate:g} ({training.learning_rate_source})",
        "training": f"{count_text(training.steps)} steps, epochs {training.epochs:g}, "
        f"{count_text(training.tokens)} tokens",
        "trainable parameters": count_text(training.trainable_parameters),
        "git commit": record.git_commit or MISSING,
    }
    if training.resumed_from:
        found["resumed from step"] = ", ".join(map(str, training.resumed_from))
    if training.validation_nll is not None:
        found["validation NLL"] = plain(training.validation_nll)
    found |= {f"hardware: {key}": value for key, value in record.hardware.items()}
    found["versions"] = ", ".join(f"{key} {value}" for key, value in record.versions.items())
    if record.export:
        found["export"] = ", ".join(f"{key} {value}" for key, value in record.export.items())
    return found
