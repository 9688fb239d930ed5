"""An evaluation as a table in plain text, for whoever prints the report."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from forgetless.escaping import one_line

if TYPE_CHECKING:
    from forgetless.evaluation.results import EvaluationReport, ItemResult, Movement

_WIDTHS = (26, 9, 9, 10, 22)  # name, base, tuned, change, its interval: 80 with the gaps
_HEAD = ("", "base", "tuned", "change", "95 % interval")


def report_text(report: EvaluationReport) -> str:
    """Base, tuned model and change with interval of each metric, and how far the layers moved."""
    lines = [] if report.scale == 1.0 else [f"ΔW scaled by {report.scale:g}"]
    if report.items:
        lines.append(_line(_HEAD))
    for item in report.items:
        lines.append(_cut(f"{item.side}: {one_line(item.name)} ({item.rows} rows)", 80))
        lines += _metrics(item)
        if item.lm_eval is not None:
            lines += [f"  {part}" for part in textwrap.wrap(one_line(str(item.lm_eval)), 76)]
    if report.movement is not None:
        lines += _movement(report.movement)
    return "\n".join(lines) or "nothing was measured"


def _metrics(item: ItemResult) -> list[str]:
    lines = []
    for name, result in item.metrics.items():
        base = "" if result.base is None else _figure(result.base.mean)
        change = "" if result.change is None else f"{result.change.mean:+.4g}"
        shown, sign = (result.tuned, "") if result.change is None else (result.change, "+")
        interval = f"{shown.low:{sign}.4g} to {shown.high:{sign}.4g}" if shown.n > 1 else "one row"
        lines.append(_line((f"  {name}", base, _figure(result.tuned.mean), change, interval)))
    return lines


def _movement(moved: Movement) -> list[str]:
    worst = [layer.drift_bound for layer in moved.layers.values() if layer.drift_bound is not None]
    figures = [
        ("update size", moved.update_size),
        ("drift", moved.drift),
        ("drift on calibration data", moved.drift_calibration),
        ("  at most (A is frozen)", moved.drift_bound),
        ("  at most, worst layer", max(worst, default=None)),
        ("leakage", moved.leakage),
        ("‖ΔW‖ / ‖W‖", moved.relative_norm),
    ]
    head = f"movement, mean over {len(moved.layers)} layers"
    rows = [(f"  {name}", "", f"{value:.3g}") for name, value in figures if value is not None]
    return [head, *(_line((*row, "", "")) for row in rows)]


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    first = f"{_cut(cells[0], _WIDTHS[0]):<{_WIDTHS[0]}}"
    rest = [f"{c:>{width}}" for c, width in zip(cells[1:], _WIDTHS[1:], strict=True)]
    return " ".join([first, *rest]).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
