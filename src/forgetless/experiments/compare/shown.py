"""Which runs of a comparison a report shows one by one, and what it tells of a point's recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.data.validation import shortened
from forgetless.escaping import one_line
from forgetless.experiments.compare.arms import Arm, arms_of
from forgetless.experiments.record import Record

MOST_SHOWN = 12
_TOLD = (
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation",
    "weight_decay",
    "warmup_ratio",
)


def shown_records(records: Sequence[Record]) -> list[Record]:
    """One run of each arm, at most twelve: the first seed at the chosen rate, else at the first."""
    arms = arms_of(records)[:MOST_SHOWN]
    return [(arm.chosen() or arm.cells[0]).records[0] for arm in arms]


def recipes_of(records: Sequence[Record]) -> dict[tuple[str, float], str]:
    """What a reader wants to know of the recipe behind a point, by arm and rate."""
    return {
        (arm.name, cell.rate): _recipe(arm, cell.records[0])
        for arm in arms_of(records)
        for cell in arm.cells
    }


def _recipe(arm: Arm, record: Record) -> str:
    """Method with its options, training, regularisers, sources of data; one line each."""
    training = record.recipe.get("training", {})
    told = {key: training.get(key) for key in _TOLD if training.get(key) is not None}
    lines = {
        "method": _pairs(record.method),
        "training": _pairs(told),
        "regularisers": ", ".join(_pairs(one) for one in training.get("regularisers") or ()),
    }
    for role in ("train", "preserve"):
        rows = [d.rows for d in record.data if d.role == role]
        if rows:
            lines[f"{role} rows"] = " + ".join(map(str, rows))
    lines["steps"] = str(record.training.steps)
    return "\n".join(f"{key}: {one_line(text)}" for key, text in lines.items() if text)


def _pairs(options: Mapping[str, Any]) -> str:
    return " ".join(
        str(value) if key == "name" else f"{key} {shortened(value)}"
        for key, value in options.items()
    )
