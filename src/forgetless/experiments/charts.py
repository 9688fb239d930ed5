"""Gain against retention, and loss curves, as inline SVG; positions in units of the viewBox."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from forgetless.escaping import one_line
from forgetless.evaluation.results import Estimate, EvaluationReport
from forgetless.experiments.drawing import Axis, Frame, element, group, marker, polyline, title
from forgetless.experiments.numbers import change_text, is_share, metric_name, plain, range_text
from forgetless.experiments.runs import (
    Run,
    gain_metric,
    improvement,
    items_of,
    loss,
    metric_of,
    retention_metrics,
)


@dataclass(frozen=True)
class Panel:
    """One chart with what to say above it, and what it shows for those who cannot see it."""

    heading: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class _Spot:
    """One evaluation in a gain/retention panel. `scale` is the factor on ΔW."""

    run: Run
    scale: float
    lost: Estimate
    gained: Estimate


def trade_off_panels(runs: Sequence[Run]) -> list[Panel]:
    """One panel per gain item and retention item: up is more gained, right is more forgotten."""
    panels = []
    for gain in items_of(runs, "gain"):
        for kept in items_of(runs, "retention"):
            panel = _trade_off(runs, gain, kept)
            if panel is not None:
                panels.append(panel)
    return panels


def loss_panel(runs: Sequence[Run]) -> Panel | None:
    """Training loss of every run over steps; None where nothing was logged."""
    curves = {
        run.index: [
            (float(p.step), p.loss) for p in run.record.training.curve if math.isfinite(p.loss)
        ]
        for run in runs
    }
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return None
    frame = Frame(
        width=400,
        height=260,
        left=40,
        bottom=38,
        x=Axis.linear([0.0, *(x for x, _ in points)]),
        y=Axis.linear([y for _, y in points]),
    )
    parts = [frame.grid("step", "training loss")]
    for run in runs:
        line = [(frame.px(x), frame.py(y)) for x, y in curves[run.index]]
        if line:
            parts.append(
                group(
                    f"m {run.colour}",
                    [
                        title(f"{run.name}: last logged loss {plain(curves[run.index][-1][1])}"),
                        polyline(line, "line"),
                        marker(run.index, *line[-1]),
                    ],
                )
            )
    return Panel("Training loss", "", frame.svg(parts, "Training loss of every run over steps"))


def _trade_off(runs: Sequence[Run], gain: str, kept: str) -> Panel | None:
    lost_by = next(iter(retention_metrics(runs, kept)), None)
    gained_by = _gain_of_scaled(runs, gain)
    if lost_by is None or gained_by is None:
        return None
    paths = {run.index: _path(run, gain, gained_by, kept, lost_by) for run in runs}
    spots = [spot for path in paths.values() for spot in path]
    if not spots:
        return None
    share = is_share(gained_by)
    factor = 100.0 if share else 1.0
    make: Callable[[Sequence[float]], Axis] = Axis.root if lost_by == "kl" else Axis.linear
    frame = Frame(
        width=340,
        height=270,
        left=46,
        bottom=40,
        x=make([0.0, *(v for s in spots for v in (s.lost.low, s.lost.mean, s.lost.high))]),
        y=Axis.linear(
            [
                0.0,
                *(factor * v for s in spots for v in (s.gained.low, s.gained.mean, s.gained.high)),
            ]
        ),
    )
    unit = "points" if share else "nats"
    x_label = "KL to the base, √ scale" if lost_by == "kl" else f"{metric_name(lost_by)} lost"
    parts = [
        frame.grid(
            f"{x_label} → {'further' if lost_by == 'kl' else 'loses more'}",
            f"{metric_name(gained_by)} gained, {unit}",
        )
    ]
    parts += [_draw_path(frame, run, paths[run.index], factor) for run in runs if paths[run.index]]
    parts.append(_base_mark(frame))
    described = "; ".join(
        f"{s.run.name}: {metric_name(lost_by)} {plain(s.lost.mean)}, "
        f"gain {plain(factor * s.gained.mean)}"
        for s in spots
        if s.scale == s.run.record.evaluation.scale
    )
    heading = one_line(kept)
    caption = f"against {metric_name(gained_by)} on {one_line(gain)}"
    return Panel(heading, caption, frame.svg(parts, f"{heading} {caption}. {described}"))


def _gain_of_scaled(runs: Sequence[Run], item: str) -> str | None:
    """The item's own gain metric, or NLL where only that was measured on scaled-down adapters."""
    chosen = gain_metric(runs, item)
    reports = [report for run in runs for report in run.record.scaled]
    if chosen is None or not reports:
        return chosen
    if any(metric_of(report, item, "gain", chosen) for report in reports):
        return chosen
    every = [*reports, *(run.record.evaluation for run in runs)]
    return "nll" if all(metric_of(report, item, "gain", "nll") for report in every) else chosen


def _path(run: Run, gain: str, gained_by: str, kept: str, lost_by: str) -> list[_Spot]:
    """The run and its scaled-down copies, by scale."""
    spots = []
    reports: list[EvaluationReport] = [*run.record.scaled, run.record.evaluation]
    for report in sorted(reports, key=lambda r: r.scale):
        gained = metric_of(report, gain, "gain", gained_by)
        lost = metric_of(report, kept, "retention", lost_by)
        better, cost = gained and improvement(gained), lost and loss(lost)
        if better and cost and all(map(math.isfinite, (*_ends(better), *_ends(cost)))):
            spots.append(_Spot(run, report.scale, cost, better))
    return spots


def _ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.low, estimate.mean, estimate.high


def _draw_path(frame: Frame, run: Run, path: Sequence[_Spot], factor: float) -> Markup:
    """The scaled copies as dots on a line from the base; the run itself with whiskers."""
    parts: list[Markup] = []
    places = [(frame.px(s.lost.mean), frame.py(factor * s.gained.mean)) for s in path]
    own = run.record.evaluation.scale
    if len(path) > 1:
        parts.append(polyline([(frame.px(0.0), frame.py(0.0)), *places], "path"))
    for spot, (x, y) in zip(path, places, strict=True):
        hint = title(_hint(spot))
        if spot.scale != own:
            parts.append(element("circle", cx=x, cy=y, r=2.4, children=[hint], **{"class": "dot"}))
            continue
        x_low, x_high = frame.px(spot.lost.low), frame.px(spot.lost.high)
        y_low, y_high = frame.py(factor * spot.gained.low), frame.py(factor * spot.gained.high)
        parts.append(
            element(
                "path",
                d=f"M{x_low:.1f} {y:.1f}H{x_high:.1f}M{x:.1f} {y_low:.1f}V{y_high:.1f}",
                **{"class": "whisker"},
            )
        )
        parts.append(group("spot", [hint, marker(run.index, x, y)]))
    return group(f"m {run.colour}", parts)


def _hint(spot: _Spot) -> str:
    own = spot.scale == spot.run.record.evaluation.scale
    name = spot.run.name if own else f"{spot.run.name}, ΔW × {spot.scale:g}"
    report = next(
        r for r in (spot.run.record.evaluation, *spot.run.record.scaled) if r.scale == spot.scale
    )
    lines = [name]
    for item in report.items:
        for result in item.metrics.values():
            text = (
                plain(result.tuned.mean)
                if result.metric == "kl"
                else (change_text(result.metric, result.change.mean) if result.change else "")
            )
            within = range_text(result.metric, result.change or result.tuned, change=True)
            if text:
                lines.append(
                    f"{one_line(item.name)}, {metric_name(result.metric)}: {text} ({within})"
                    if within
                    else f"{one_line(item.name)}: {text}"
                )
    return "\n".join(lines)


def _base_mark(frame: Frame) -> Markup:
    x, y = frame.px(0.0), frame.py(0.0)
    cross = f"M{x - 4:.1f} {y:.1f}h8M{x:.1f} {y - 4:.1f}v8"
    return group(
        "base",
        [
            title("base model: nothing gained, nothing forgotten"),
            element("path", d=cross),
        ],
    )
