"""A comparison as tables: for the page, as Markdown for a paper, and flat rows for CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.escaping import markdown_text, one_line
from forgetless.experiments.compare.results import (
    ArmResult,
    Comparison,
    Interval,
    Matched,
    Measure,
    OnFront,
)
from forgetless.experiments.numbers import (
    MISSING,
    change_text,
    count_text,
    metric_name,
    plain,
    seconds_text,
    signed,
)

GIB = 2**30


@dataclass(frozen=True)
class Cell:
    """A figure as text, with its interval below it, and what to sort by."""

    text: str = MISSING
    interval: str = ""
    sort: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Grid:
    """A table with a row an arm; `rows` hold an arm's place among all arms and its cells."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[int, tuple[Cell, ...]], ...]


def grids(found: Comparison) -> list[Grid]:
    """What was gained and lost, how that stands to plain LoRA, and what it cost."""
    chosen = [(place, arm) for place, arm in enumerate(found.arms) if arm.chosen_rate is not None]
    tables = [_levels(chosen), *_against_lora(chosen), _costs(chosen)]
    return [table for table in tables if table is not None]


def markdown(found: Comparison) -> str:
    """All tables in Markdown, with the sentences above and the notes below."""
    parts = [f"**{markdown_text(found.title)}.**", *map(markdown_text, found.words)]
    for grid in grids(found):
        lines = [["method", *grid.head]]
        for place, cells in grid.rows:
            texts = [f"{c.text} ({c.interval})" if c.interval else c.text for c in cells]
            lines.append([found.arms[place].name, *texts])
        written = [f"| {' | '.join(markdown_text(text) for text in line)} |" for line in lines]
        rule = f"|---|{'---:|' * len(grid.head)}"
        table = "\n".join([written[0], rule, *written[1:]])
        parts.append(f"### {markdown_text(grid.title)}\n\n{table}")
    return "\n\n".join([*parts, *map(markdown_text, found.notes)]) + "\n"


def flat_rows(found: Comparison) -> list[dict[str, Any]]:
    """Every figure of every point: arm, rate, scale and metric; None where there is none."""
    return [
        {
            "arm": point.arm,
            "rate": point.rate,
            "scale": point.scale,
            "seeds": len(point.seeds),
            "chosen": point.is_chosen,
            "update_size": point.update_size,
            "drift": point.drift,
            "side": measure.side,
            "item": measure.item,
            "metric": measure.metric,
            "change": measure.figure.value,
            "low": measure.figure.low,
            "high": measure.figure.high,
            "seeds_sd": measure.seeds_sd,
        }
        for point in found.points
        for measure in point.measures
    ]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with a head; a text that a spreadsheet would take for a formula is quoted."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: _safe(value) if isinstance(value, str) else value for key, value in row.items()}
            for row in rows
        )
    return out.getvalue()


def _safe(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _levels(arms: Sequence[tuple[int, ArmResult]]) -> Grid | None:
    """Gain and loss against the base, each arm at its own rate."""
    columns = list(
        dict.fromkeys((m.side, m.item, m.metric) for _, arm in arms for m in arm.measures)
    )
    if not columns:
        return None
    rows = []
    for place, arm in arms:
        by_column = {(m.side, m.item, m.metric): m for m in arm.measures}
        cells = [
            Cell(f"{arm.chosen_rate:g}", sort=arm.chosen_rate),
            Cell(str(len(arm.seeds)), sort=float(len(arm.seeds))),
            *(_measure(by_column.get(column)) for column in columns),
            _plain(arm.update_size),
        ]
        rows.append((place, tuple(cells)))
    head = ["rate", "seeds"]
    head += [
        f"{one_line(item)}: {metric_name(metric)}"
        + ("" if metric == "kl" else " gained" if side == "gain" else " lost")
        for side, item, metric in columns
    ]
    note = "Against the base, at each method's chosen rate. KL is to the base."
    return Grid("What was gained and lost", note, (*head, "F_Δ"), tuple(rows))


def _against_lora(arms: Sequence[tuple[int, ArmResult]]) -> list[Grid]:
    """One table for each gain and item to keep."""
    planes = list(dict.fromkeys((p.gain, p.item, p.metric) for _, arm in arms for p in arm.fronts))
    found = []
    for gain, item, metric in planes:
        rows = []
        for place, arm in arms:
            matched = _in_plane(arm.matched, gain, item, metric)
            front = _in_plane(arm.fronts, gain, item, metric)
            factor = next((r.factor for r in arm.residuals if (r.item, r.metric) == (item, metric)),
                          None)  # fmt: skip
            rows.append((place, (*_matched(matched), *_front(front), _plain(factor))))
        unit = "times LoRA's" if metric == "kl" else "minus LoRA's"
        found.append(
            Grid(
                f"{metric_name(metric)} on {one_line(item)} at the same gain on {one_line(gain)}",
                f"{metric_name(metric)}, {unit} at the same gain: LoRA turned down, or at another "
                "rate and weight decay, or the better of both. Then: the chance to be on the front "
                "of gain and loss, the share of the plane that all rates and scales dominate, and "
                "what is lost against the law of update size (1 is the law).",
                ("LoRA turned down", "LoRA tuned", "better of both", "same gain: ", "P(front)",
                 "hypervolume", "of the law"),
                tuple(rows),
            )
        )  # fmt: skip
    return found


def _costs(arms: Sequence[tuple[int, ArmResult]]) -> Grid | None:
    rows = []
    for place, arm in arms:
        cost, band = arm.cost, arm.band
        if cost is None:
            continue
        safe = MISSING
        if band is not None:
            safe = f"{band.low:g} to {band.high:g}" if band.low != band.high else f"{band.low:g}"
        memory, worked = cost.peak_memory, cost.training_processor_seconds
        rows.append(
            (
                place,
                (
                    Cell(safe, sort=None if band is None else band.high / band.low),
                    Cell(" ".join(f"{rate:g}" for rate in arm.rates)),
                    Cell(seconds_text(cost.calibration_seconds), sort=cost.calibration_seconds),
                    Cell(seconds_text(cost.training_seconds), sort=cost.training_seconds),
                    Cell() if worked is None else Cell(seconds_text(worked), sort=worked),
                    Cell(count_text(cost.trainable_parameters), sort=cost.trainable_parameters),
                    Cell() if memory is None else Cell(f"{memory / GIB:.1f} GiB", sort=memory),
                ),
            )
        )
    if not rows:
        return None
    head = (
        "safe rates",
        "rates tried",
        "calibration",
        "training",
        "processor",
        "trainable",
        "peak memory",
    )
    note = (
        "Safe: rates next to the chosen one that gain nine tenths as much and lose no more than "
        "plain LoRA at its own. Calibration: of the run that took longest, as the others had its "
        "moments and start from the cache; less where runs of another method had collected them. "
        "Training: mean over the runs at the chosen rate, by the clock and in processor time."
    )
    return Grid("What it costs", note, head, tuple(rows))


def _in_plane(
    found: Sequence[Matched] | Sequence[OnFront], gain: str, item: str, metric: str
) -> Any:
    return next((one for one in found if (one.gain, one.item, one.metric) == (gain, item, metric)),
                None)  # fmt: skip


def _matched(one: Matched | None) -> tuple[Cell, ...]:
    if one is None:
        return (Cell(),) * 4
    words = f"{one.outcome}{', gains more' if one.beyond else ''}"
    mark = {"kept more": "better", "lost more": "worse"}.get(one.outcome, "")
    figures = [_plain(f, change=not one.is_ratio) for f in (one.scaled, one.tuned, one.best)]
    return (*figures, Cell(words, sort=figures[2].sort, mark=mark))


def _front(one: OnFront | None) -> tuple[Cell, ...]:
    if one is None:
        return (Cell(),) * 2
    probability = Cell(f"{one.probability:.2f}", sort=one.probability)
    return probability, _plain(one.hypervolume)


def _measure(one: Measure | None) -> Cell:
    if one is None or one.figure.value is None:
        return Cell()
    if one.metric == "kl":
        return _plain(one.figure)
    text = change_text(one.metric, one.figure.value)
    ends = [one.figure.low, one.figure.high]
    known = [
        change_text(one.metric, end).removesuffix("pts").strip() for end in ends if end is not None
    ]
    return Cell(text, " to ".join(known), one.figure.value)


def _plain(figure: Interval | None, *, change: bool = False) -> Cell:
    if figure is None or figure.value is None:
        return Cell()
    write = signed if change else plain
    interval = ""
    if figure.low is not None and figure.high is not None:
        ends = [write(figure.low), write(figure.high)]
        interval = " to ".join(ends) if ends[0] != ends[1] else ""
    return Cell(write(figure.value), interval, figure.value)
