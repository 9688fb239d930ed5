"""Records of small_runs.py as the Markdown table of docs/results.md.

    python benchmarks/results_table.py OUTPUT/*/record.json

One line a run; the same LoRA with its update turned down below it, and LoRA at the gain of the
others, interpolated along the scale between the measured ones; of KL its root is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forgetless.evaluation.results import EvaluationReport
from forgetless.experiments.record import Record, load_record

Figures = dict[str, float]


def figures(report: EvaluationReport) -> Figures:
    """Every mean by `item metric`, and movement."""
    found = {
        f"{item.name} {name}": metric.tuned.mean
        for item in report.items
        for name, metric in item.metrics.items()
    }
    if report.movement is not None:
        found |= {"F_Δ": report.movement.update_size, "drift": report.movement.drift}
    return found


def base_figures(report: EvaluationReport) -> Figures:
    """The base's own means; its KL to itself is 0."""
    return {
        f"{item.name} {name}": 0.0 if metric.base is None else metric.base.mean
        for item in report.items
        for name, metric in item.metrics.items()
    }


def at_gain(record: Record, gain: str, target: float) -> tuple[float, Figures]:
    """Scale and figures at which the gain NLL is `target`, between measured scales."""
    points = [(0.0, base_figures(record.evaluation))]
    points += [(r.scale, figures(r)) for r in [*record.scaled, record.evaluation]]
    points.sort(key=lambda point: point[0])
    scales = [scale for scale, _ in points]
    losses = [found[gain] for _, found in points]
    if not np.all(np.diff(losses) < 0):
        raise SystemExit(f"{record.label}: NLL does not fall with the scale: {losses}")
    scale = float(np.interp(-target, [-loss for loss in losses], scales))
    keys = points[0][1]
    return scale, {
        key: _between(scale, scales, [found[key] for _, found in points], key) for key in keys
    }


def _between(scale: float, scales: Sequence[float], values: Sequence[float], key: str) -> float:
    """A figure at a scale between measured ones; KL grows about as the square of the scale."""
    if key.endswith(" kl"):
        return float(np.interp(scale, scales, np.sqrt(np.maximum(values, 0))) ** 2)
    return float(np.interp(scale, scales, values))


def line(label: str, found: Figures, columns: Sequence[str]) -> str:
    """One row of the table."""
    cells = []
    for column in columns:
        value = found.get(column)
        if value is None:
            cells.append("–")
        elif "match" in column:
            cells.append(f"{100 * value:.0f} %")
        else:
            cells.append(f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.3f}")
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    records = {record.label: record for record in map(load_record, map(Path, sys.argv[1:]))}
    first = next(iter(records.values()))
    columns = [*base_figures(first.evaluation), "F_Δ", "drift"]
    print(f"| | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    print(line("base", base_figures(first.evaluation), columns))
    for label, record in records.items():
        print(line(label, figures(record.evaluation), columns))
        for report in record.scaled:
            print(line(f"{label}, ΔW × {report.scale:g}", figures(report), columns))
    gain = next(f"{i.name} nll" for i in first.evaluation.items if i.side == "gain")
    for label, record in records.items():
        if not record.scaled:
            continue
        for other in records.values():
            target = figures(other.evaluation)[gain]
            if other.label != label and target > figures(record.evaluation)[gain]:
                scale, found = at_gain(record, gain, target)
                name = f"{label}, ΔW × {scale:.2f}: the gain of {other.label}"
                print(line(name, found, columns))


if __name__ == "__main__":
    main()
