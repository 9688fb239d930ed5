"""An evaluation as a model card tells it: a Markdown table, and samples that may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from forgetless.adapters.card import CardFigures, CardSample
from forgetless.adapters.public_names import public_name
from forgetless.escaping import markdown_text

if TYPE_CHECKING:
    from forgetless.evaluation.results import EvaluationReport, ItemResult, MetricResult, Movement


def card_figures(report: EvaluationReport) -> CardFigures:
    """Base, tuned model and change with interval of each metric, movement, and all samples."""
    tuned = "tuned" if report.scale == 1.0 else f"tuned, scale {report.scale:g}"
    lines = [_line(("", "base", tuned)), "| --- | ---: | ---: |"]
    for item in report.items:
        lines += [
            _line((f"{item.side}: {public_name(item.name)}, {name}", *_cells(result)))
            for name, result in item.metrics.items()
        ]
    if report.movement is not None:
        lines += _movement(report.movement)
    samples = tuple(sample for item in report.items for sample in card_samples(item))
    return CardFigures("\n".join(lines) if len(lines) > 2 else "", samples, report.scale)


def card_samples(item: ItemResult) -> list[CardSample]:
    """Prompt and both answers of each sample of an item."""
    return [
        CardSample(
            public_name(item.name), one.prompt, one.base, one.tuned, item.samples_can_be_shared
        )
        for one in item.samples
    ]


def _cells(result: MetricResult) -> tuple[str, str]:
    """`1.92` and `0.874 (−1.05; −1.2 to −0.9)`; what has no base has no change."""
    base = "" if result.base is None else f"{result.base.mean:.4g}"
    shown, sign = (result.tuned, "") if result.change is None else (result.change, "+")
    change = "" if result.change is None else f"{result.change.mean:+.4g}; "
    interval = f"{shown.low:{sign}.4g} to {shown.high:{sign}.4g}" if shown.n > 1 else "one row"
    return base, f"{result.tuned.mean:.4g} ({change}{interval})"


def _movement(moved: Movement) -> list[str]:
    figures = {"update size F_Δ": moved.update_size, "drift": moved.drift}
    return [_line((name, "", f"{value:.3g}")) for name, value in figures.items()]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(markdown_text(cell) for cell in cells)} |"
