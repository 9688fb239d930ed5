"""Figures → table rows: base and methods side by side, as text in cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forgetless.evaluation.results import Estimate, MetricResult, Movement, Side
from forgetless.experiments.numbers import (
    MISSING,
    change_text,
    count_text,
    is_share,
    metric_name,
    plain,
    range_text,
    value_text,
)
from forgetless.experiments.runs import (
    Run,
    improvement,
    is_significant,
    measured,
    metric_of,
)

Mark = Literal["", "better", "worse", "not significant", "one row"]


@dataclass(frozen=True)
class Cell:
    """One figure as text: level and interval, change and interval, and what the change is."""

    value: str = MISSING
    interval: str = ""
    change: str = ""
    change_interval: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Column:
    """One metric of one item, with how many columns its item spans (0 = not the item's first).

    `line` is the metric's line where a narrow screen turns the table: line 1 holds the models, and
    each item's name takes a line of its own before its metrics.
    """

    item: str
    metric: str
    label: str
    span: int
    line: int


@dataclass(frozen=True)
class Row:
    """The base model, or one run."""

    name: str
    run: Run | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A title, columns grouped by item, and rows with the base first."""

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def result_tables(runs: Sequence[Run]) -> list[Table]:
    """What was kept (KL, NLL), what was gained, then accuracies on what should be kept."""
    kept = [c for c in measured(runs, "retention") if c[1] in ("kl", "nll")]
    others = [
        c for c in measured(runs, "retention") if not is_share(c[1]) and c[1] not in ("kl", "nll")
    ]
    answers = [c for c in measured(runs, "retention") if is_share(c[1])]
    gained = list(measured(runs, "gain"))
    tables = [
        (
            "Kept",
            "KL to the base and NLL on held-out rows, nats per token. Lower is better.",
            "retention",
            kept,
        ),
        ("Gained", "On held-out rows of what was to be learned.", "gain", gained),
        (
            "Kept, as answers",
            "Share of rows for which it holds, with 95 % intervals.",
            "retention",
            answers,
        ),
        (
            "Kept, by other measures",
            "Refusal margin in nats; your judges and metrics of lm-eval in their own units. "
            "With 95 % intervals.",
            "retention",
            others,
        ),
    ]
    return [_table(t, n, runs, _side(side), columns) for t, n, side, columns in tables if columns]


def figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every figure as a flat row, scaled-down evaluations too; what is not finite becomes None."""
    rows = []
    for run in runs:
        for report in (run.record.evaluation, *run.record.scaled):
            for item in report.items:
                for result in item.metrics.values():
                    head = {
                        "run": run.name,
                        "scale": report.scale,
                        "side": item.side,
                        "item": item.name,
                        "metric": result.metric,
                        "rows": item.rows,
                    }
                    rows.append(
                        head
                        | _flat("base", result.base)
                        | _flat("tuned", result.tuned)
                        | _flat("change", result.change)
                    )
    return rows


def movement_rows(runs: Sequence[Run]) -> list[tuple[Run, tuple[str, ...]]]:
    """How far each run moved, in words of numbers; dashes where it was not measured."""
    rows = []
    for run in runs:
        moved, training = run.record.evaluation.movement, run.record.training
        parts: tuple[str, ...] = (MISSING,) * 5
        if moved is not None:
            parts = (
                plain(moved.update_size),
                plain(moved.drift),
                _on_calibration(moved),
                MISSING if moved.leakage is None else plain(moved.leakage),
                plain(moved.relative_norm),
            )
        rows.append(
            (
                run,
                (
                    *parts,
                    f"{training.learning_rate:g}",
                    count_text(training.steps),
                    count_text(training.trainable_parameters),
                ),
            )
        )
    return rows


def _on_calibration(moved: Movement) -> str:
    """Drift on calibration data, and what it cannot exceed where A is frozen."""
    if moved.drift_calibration is None:
        return MISSING
    bound = "" if moved.drift_bound is None else f" ≤ {plain(moved.drift_bound)}"
    return plain(moved.drift_calibration) + bound


def _side(text: str) -> Side:
    return "gain" if text == "gain" else "retention"


def _table(
    title: str, note: str, runs: Sequence[Run], side: Side, columns: Sequence[tuple[str, str]]
) -> Table:
    found = []
    for place, (item, metric) in enumerate(columns):
        first = place == 0 or columns[place - 1][0] != item
        span = sum(name == item for name, _ in columns) if first else 0
        line = 2 + place + len({name for name, _ in columns[: place + 1]})
        found.append(Column(item, metric, metric_name(metric), span, line))
    results = [
        (run, [metric_of(run.record.evaluation, item, side, metric) for item, metric in columns])
        for run in runs
    ]
    base = [_base_cell([row[place] for _, row in results]) for place in range(len(columns))]
    rows = [Row("base", None, tuple(base))]
    rows += [Row(run.name, run, tuple(_cell(result) for result in row)) for run, row in results]
    return Table(title, note, tuple(found), tuple(rows))


def _base_cell(results: Sequence[MetricResult | None]) -> Cell:
    """The base's value; KL of the base to itself is 0 by definition."""
    for result in results:
        if result is not None and result.metric == "kl":
            return Cell("0")
        if result is not None and result.base is not None:
            value = value_text(result.metric, result.base.mean)
            return Cell(value, range_text(result.metric, result.base))
    return Cell()


def _cell(result: MetricResult | None) -> Cell:
    if result is None:
        return Cell()
    metric, change = result.metric, result.change
    value, interval = value_text(metric, result.tuned.mean), range_text(metric, result.tuned)
    if change is None:
        return Cell(value, interval)
    return Cell(
        value,
        interval,
        change_text(metric, change.mean),
        range_text(metric, change, change=True),
        _mark(result),
    )


def _mark(result: MetricResult) -> Mark:
    better = improvement(result)
    if better is None:
        return ""
    if better.n <= 1:
        return "one row"
    if not is_significant(better):
        return "not significant"
    return "better" if better.low > 0 else "worse"


def _flat(name: str, estimate: Estimate | None) -> dict[str, float | int | None]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_n": None}
    values = {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    finite = {key: value if abs(value) < float("inf") else None for key, value in values.items()}
    return {**finite, f"{name}_n": estimate.n}
