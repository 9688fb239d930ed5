"""Per-layer leakage and drift: one small panel per kind of layer, depth from left to right."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from forgetless.escaping import one_line
from forgetless.evaluation.results import LayerMovement
from forgetless.experiments.charts import Panel
from forgetless.experiments.drawing import Axis, Frame, element, group, marker, polyline, title
from forgetless.experiments.numbers import plain
from forgetless.experiments.runs import Run

_BLOCK = re.compile(r"^(?P<stack>.*?)\.?(?<![^.])(?P<block>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class LayerRow:
    """One quantity over all layers: a heading, what it means, and a panel per kind of layer."""

    heading: str
    note: str
    panels: tuple[Panel, ...]

    @property
    def columns(self) -> int:
        """Panels in a line of a wide page: all of up to 7, else lines of about equal length."""
        return math.ceil(len(self.panels) / math.ceil(len(self.panels) / 7))


def layer_rows(runs: Sequence[Run]) -> list[LayerRow]:
    """Leakage and drift of every adapted layer; empty where no run measured movement."""
    rows = []
    for heading, note in (
        (
            "Leakage",
            "Energy of held-out preserve data inside the row space of A; 1 is what a random "
            "direction would carry. Logarithmic.",
        ),
        (
            "Drift",
            "How far outputs on held-out preserve data moved: tr(ΔW M ΔWᵀ) / tr(W M Wᵀ). "
            "Logarithmic.",
        ),
    ):
        panels = _panels(runs, heading.lower())
        if panels:
            rows.append(LayerRow(heading, note, tuple(panels)))
    return rows


def split_layer(name: str) -> tuple[str, int | None]:
    """A layer's kind and block: `model.layers.3.mlp.up_proj` → (`mlp.up_proj`, 3)."""
    found = _BLOCK.match(name)
    return (found["kind"], int(found["block"])) if found else (name, None)


def _value(layer: LayerMovement, quantity: str) -> float | None:
    return layer.leakage if quantity == "leakage" else layer.drift


def _panels(runs: Sequence[Run], quantity: str) -> list[Panel]:
    series: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for run in runs:
        moved = run.record.evaluation.movement
        for name, layer in moved.layers.items() if moved else ():
            kind, block = split_layer(name)
            places = series.setdefault(kind, {}).setdefault(run.index, [])
            value = _value(layer, quantity)
            if value is not None and math.isfinite(value):
                places.append((len(places) if block is None else block, value))
    values = [v for kind in series.values() for line in kind.values() for _, v in line if v > 0]
    if not values:
        return []
    axis = Axis.log(values)
    short = _short_names(list(series))
    return [
        Panel(short[kind], "", _panel(runs, kind, lines, axis, quantity))
        for kind, lines in series.items()
        if any(lines.values())
    ]


def _panel(
    runs: Sequence[Run],
    kind: str,
    lines: dict[int, list[tuple[int, float]]],
    axis: Axis,
    quantity: str,
) -> Markup:
    last = max(block for line in lines.values() for block, _ in line)
    x = Axis(0.0, float(max(last, 1)), "linear", (0.0, float(last)) if last else (0.0,))
    frame = Frame(width=150, height=140, left=30, bottom=30, x=x, y=axis, top=6, right=8)
    parts = [frame.grid("block", "")]
    if quantity == "leakage" and axis.low < 1 < axis.high:
        y = frame.py(1.0)
        parts.append(element("path", d=f"M30 {y:.1f}H142", **{"class": "hair one"}))
    for run in runs:
        line = sorted(lines.get(run.index, ()))
        if not line:
            continue
        places = [(frame.px(block), frame.py(value)) for block, value in line]
        middle = sorted(value for _, value in line)[len(line) // 2]
        hint = title(
            f"{run.name}, {kind}: median {plain(middle)}, "
            f"{plain(line[0][1])} in the first and {plain(line[-1][1])} in the last"
        )
        line_and_end = [polyline(places, "line thin"), marker(run.index, *places[-1], half=2.6)]
        parts.append(group(f"m {run.colour}", [hint, *line_and_end]))
    return frame.svg(parts, f"{quantity} of {one_line(kind)} by block")


def _short_names(kinds: Sequence[str]) -> dict[str, str]:
    """The last part of each name, or the whole name where that is not enough to tell them apart."""
    ends = [one_line(kind).rsplit(".", 1)[-1] for kind in kinds]
    unique = len(set(ends)) == len(ends)
    return {kind: end if unique else one_line(kind) for kind, end in zip(kinds, ends, strict=True)}
