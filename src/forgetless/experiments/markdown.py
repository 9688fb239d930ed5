"""The base / methods table as Markdown, for a README, docs or a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from forgetless.evaluation.results import EvaluationReport
from forgetless.experiments.numbers import MISSING, one_line
from forgetless.experiments.record import Record
from forgetless.experiments.runs import name_runs, not_comparable
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
    if any(run.record.recipe.get("quick") for run in runs):
        text += ["", "Quick run: nothing is claimed."]
    elif reasons := not_comparable(runs):
        text += ["", f"Not comparable: {_markdown_text('; '.join(reasons))}."]
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
    return f"| {' | '.join(_markdown_text(cell) for cell in cells)} |"


def _markdown_text(text: str) -> str:
    """Text that stays inside its cell: no line break, no column, no tag, no link or image."""
    return (
        re.sub(r"([\\|`*\[\]])", r"\\\1", one_line(text)).replace("&", "&amp;").replace("<", "&lt;")
    )


def evaluation_table(reports: Sequence[EvaluationReport]) -> str:
    """Figures of one adapter as a Markdown table: a line a metric, a column a scale."""
    scales = [f"scale {report.scale:g}" for report in reports]
    lines = [["", "base", *scales], ["---", *("---:" for _ in range(len(reports) + 1))]]
    for place, item in enumerate(reports[0].items):
        for name, metric in item.metrics.items():
            base = MISSING if metric.base is None else f"{metric.base.mean:.4g}"
            cells = []
            for report in reports:
                tuned = report.items[place].metrics[name]
                shown = tuned.tuned if tuned.change is None else tuned.change
                cells.append(f"{tuned.tuned.mean:.4g} ({shown.low:+.3g} to {shown.high:+.3g})")
            lines.append([f"{item.side}: {one_line(item.name)}, {name}", base, *cells])
    movement = reports[0].movement
    if movement is not None:
        for label, value in (
            ("update size F_Δ", movement.update_size),
            ("drift", movement.drift),
            ("leakage", movement.leakage),
        ):
            lines.append([label, MISSING, f"{value:.3g}", *(MISSING for _ in reports[1:])])
    rows = [_markdown_line(lines[0]), f"| {' | '.join(lines[1])} |"]
    rows += [_markdown_line(line) for line in lines[2:]]
    rows += ["", "In brackets: the 95 % interval of the change, for KL of the value."]
    return "\n".join(rows)
