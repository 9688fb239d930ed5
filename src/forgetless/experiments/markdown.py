"""The base / methods table as Markdown, for a README, docs or a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from forgetless.escaping import markdown_text, one_line
from forgetless.evaluation.results import EvaluationReport, ItemResult
from forgetless.experiments.numbers import (
    MISSING,
    change_text,
    metric_name,
    plain,
    range_text,
    value_text,
)
from forgetless.experiments.record import Record
from forgetless.experiments.runs import metric_of, name_runs, not_comparable, task_lines
from forgetless.experiments.tables import Cell, movement_rows, result_tables


def markdown_table(records: Sequence[Record]) -> str:
    """Base and methods as a Markdown table, one line a measure, for a README, docs or a terminal.

    Args:
        records: One or several records; the base values are those of the first that measured them.

    Returns:
        The table, ending in a newline; empty text where there are no records.
    """
    if not records:
        return ""
    runs = name_runs(records)
    lines = [["", "base", *(run.name for run in runs)]]
    for table in result_tables(runs):
        for place, column in enumerate(table.columns):
            cells = [_markdown_cell(row.cells[place]) for row in table.rows]
            lines.append([f"{table.title}: {one_line(column.item)}, {column.label}", *cells])
    for place, name in enumerate(("update size F_Δ", "drift")):
        moved = [parts[place] for _, parts in movement_rows(runs)]
        if set(moved) != {MISSING}:
            lines.append([name, MISSING, *moved])
    rule = ["---", *("---:" for _ in lines[0][1:])]
    text = [_markdown_line(line) for line in [lines[0], *lines[1:]]]
    text.insert(1, f"| {' | '.join(rule)} |")
    for line in task_lines([run.record.evaluation for run in runs]):
        text += ["", f"{markdown_text(line)}."]
    if any(run.record.recipe.get("claims") is False for run in runs):
        text += ["", "Quick run: nothing is claimed."]
    elif reasons := not_comparable(runs):
        text += ["", f"Not comparable: {markdown_text('; '.join(reasons))}."]
    return "\n".join(text) + "\n"


def _markdown_cell(cell: Cell) -> str:
    text = cell.value
    if cell.change:
        doubt = f", {cell.mark}" if cell.mark in ("not significant", "one row") else ""
        interval = f"; {cell.change_interval}" if cell.change_interval else ""
        text += f" ({cell.change}{doubt}{interval})"
    elif cell.interval:
        text += f" ({cell.interval})"
    return text


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(markdown_text(cell) for cell in cells)} |"


def evaluation_table(reports: Sequence[EvaluationReport]) -> str:
    """Figures of one adapter as a Markdown table: a line a metric, a column a scale."""
    lines = [["", "base", *(f"scale {report.scale:g}" for report in reports)]]
    for item in reports[0].items:
        for name, metric in item.metrics.items():
            base = MISSING if metric.base is None else value_text(name, metric.base.mean)
            cells = [_tuned_text(report, item, name) for report in reports]
            label = f"{item.side}: {one_line(item.name)}, {metric_name(name)}"
            lines.append([label, base, *cells])
    moves = [report.movement for report in reports]
    for label, figures in (
        ("update size F_Δ", [m.update_size if m else None for m in moves]),
        ("drift", [m.drift if m else None for m in moves]),
        ("leakage", [m.leakage if m else None for m in moves]),
    ):
        if any(figure is not None for figure in figures):
            lines.append([label, MISSING, *(MISSING if f is None else plain(f) for f in figures)])
    rule = f"| {' | '.join(['---', *('---:' for _ in lines[0][1:])])} |"
    rows = [_markdown_line(line) for line in lines]
    note = "The tuned model's value, its change from the base, and the 95 % interval of the change"
    tasks = [part for line in task_lines(reports) for part in ("", f"{markdown_text(line)}.")]
    return "\n".join([rows[0], rule, *rows[1:], "", f"{note} (for KL, of the value).", *tasks])


def _tuned_text(report: EvaluationReport, item: ItemResult, name: str) -> str:
    """`6.692 −0.146 (−0.184 to −0.112)`; what has no base has no change."""
    result = metric_of(report, item.name, item.side, name)
    if result is None:
        return MISSING
    change = result.change
    text = value_text(name, result.tuned.mean)
    if change is not None:
        text += f" {change_text(name, change.mean)}"
        interval = range_text(name, change, change=True)
    else:
        interval = range_text(name, result.tuned)
    return f"{text} ({interval})" if interval else text
