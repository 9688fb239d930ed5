"""The tables of docs/results.md, from the figures that small_runs.py stored.

    python benchmarks/results_table.py [TASK ...]

One line a run. Plain LoRA with its update turned down stands below it; `KL / LoRA's` is a run's KL
over that of plain LoRA at the run's own gain, read off between LoRA's measured scales (the root of
KL, which grows about as the square of the scale): first on the matched set, then the geometric mean
of the others. Above LoRA's best gain there is nothing to compare with.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from grid import TASKS, small_runs

RESULTS = Path(__file__).parent / "results" / "small_runs"
MATCHED = {"gsm8k": "NQ-open", "demo": "world facts", "calibration": "NQ-open"}
BASELINE = "lora 0.001"

Figures = dict[str, float]


def figures(report: dict[str, Any]) -> Figures:
    """Every mean by `item metric`, and movement."""
    found = {
        f"{item['name']} {name}": metric["tuned"]["mean"]
        for item in report["items"]
        for name, metric in item["metrics"].items()
    }
    moved = report["movement"]
    return found | {"F_Δ": moved["update_size"], "drift": moved["drift"]}


def base_figures(report: dict[str, Any]) -> Figures:
    """The base's own means; its KL to itself is 0, and it does not move."""
    return {"F_Δ": 0.0, "drift": 0.0} | {
        f"{item['name']} {name}": 0.0 if metric["base"] is None else metric["base"]["mean"]
        for item in report["items"]
        for name, metric in item["metrics"].items()
    }


def gain_of(stored: dict[str, Any]) -> str:
    """The gain item's NLL."""
    items = stored["evaluation"]["items"]
    return next(f"{item['name']} nll" for item in items if item["side"] == "gain")


def at_gain(baseline: dict[str, Any], target: float) -> Figures | None:
    """The baseline turned down until its gain NLL is `target`; None where it never is."""
    points = [(0.0, base_figures(baseline["evaluation"]))]
    reports = [*baseline["scaled"], baseline["evaluation"]]
    points += sorted(((r["scale"], figures(r)) for r in reports), key=lambda point: point[0])
    scales = [scale for scale, _ in points]
    losses = [found[gain_of(baseline)] for _, found in points]
    if not np.all(np.diff(losses) < 0):
        raise SystemExit(f"{BASELINE}: NLL does not fall with the scale: {losses}")
    if target < losses[-1]:
        return None
    scale = float(np.interp(-target, [-loss for loss in losses], scales))
    return {
        key: _between(scale, scales, [found[key] for _, found in points], key)
        for key in points[0][1]
    }


def _between(scale: float, scales: list[float], values: list[float], key: str) -> float:
    if key.endswith(" kl") or key == "drift":
        return float(np.interp(scale, scales, np.sqrt(np.maximum(values, 0))) ** 2)
    return float(np.interp(scale, scales, values))


def against(found: Figures, baseline: Figures | None, matched: str) -> list[str]:
    """KL over the baseline's: on the matched set, and the geometric mean of the others."""
    if baseline is None:
        return ["–", "–"]
    kls = [key for key in found if key.endswith(" kl")]
    ratio = {key: max(found[key], 1e-9) / max(baseline[key], 1e-9) for key in kls}
    others = [math.log(ratio[key]) for key in kls if key != f"{matched} kl"]
    return [f"{ratio[f'{matched} kl']:.2g}", f"{math.exp(sum(others) / len(others)):.2g}"]


def cell(column: str, value: float) -> str:
    """One figure as the table shows it."""
    if "match" in column:
        return f"{100 * value:.0f} %"
    return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.3f}"


def table(task: str) -> str:
    """The table of one task, of what has run so far."""
    runs: dict[str, dict[str, Any]] = {}
    for one in small_runs():
        path = RESULTS / one.task / f"{one.slug}.json"
        if one.task == task and path.exists():
            runs[one.label] = json.loads(path.read_text(encoding="utf-8"))
    if BASELINE not in runs:
        return f"{task}: {BASELINE} has not run yet\n"
    baseline = runs[BASELINE]
    gain = gain_of(baseline)
    columns = [
        column
        for column in base_figures(baseline["evaluation"])
        if column == gain or column.endswith((" kl", "greedy_match"))
    ]
    columns += ["F_Δ", "drift"]
    head = [*columns, "KL / LoRA's: matched", "others", "s calibrating", "s training"]
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    base = base_figures(baseline["evaluation"])
    lines.append(f"| base | {' | '.join(cell(c, base[c]) for c in columns)} | | | | |")
    for label, stored in sorted(runs.items(), key=lambda pair: _place(pair[1], MATCHED[task])):
        found = figures(stored["evaluation"])
        compared = against(found, at_gain(baseline, found[gain]), MATCHED[task])
        spent = stored["processor_seconds"]
        cells = [*(cell(c, found[c]) for c in columns), *compared]
        cells += [f"{spent['calibrate']:.0f}", f"{spent['train']:.0f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        for report in stored["scaled"]:
            turned = figures(report)
            cells = [*(cell(c, turned[c]) for c in columns), "", "", "", ""]
            lines.append(f"| {label}, ΔW × {report['scale']:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _place(stored: dict[str, Any], matched: str) -> float:
    """What is kept best comes first: KL on the sets that nothing was calibrated on."""
    found = figures(stored["evaluation"])
    kls = [v for k, v in found.items() if k.endswith(" kl") and k != f"{matched} kl"]
    return sum(math.log(max(kl, 1e-9)) for kl in kls)


def main() -> None:
    for task in sys.argv[1:] or [*TASKS, "calibration"]:
        print(f"### {task}\n\n{table(task)}")


if __name__ == "__main__":
    main()
