"""Gain against loss over all rates and scales, as inline SVG: a line an arm, a point a rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from forgetless.escaping import one_line
from forgetless.experiments.charts import Panel
from forgetless.experiments.compare.results import Comparison, Measure, Point
from forgetless.experiments.drawing import Axis, Frame, element, group, marker, polyline, title
from forgetless.experiments.numbers import is_share, metric_name, plain

_WIDE = 300.0  # largest loss to smallest, above which the axis is logarithmic
_LEAST = 1e-6


def colour_of(arms: Sequence[bool], place: int) -> str:
    """Class of an arm's colour: plain LoRA grey, the others in turn. `arms`: which are plain."""
    return "m-lora" if arms[place] else f"m{sum(not plain_one for plain_one in arms[:place]) % 8}"


def plane_panels(found: Comparison, recipes: Mapping[tuple[str, float], str]) -> list[Panel]:
    """A panel for each gain and item to keep.

    Args:
        found: The comparison.
        recipes: What to show of a run's recipe, by arm and rate.
    """
    planes = list(
        dict.fromkeys((p.gain, p.item, p.metric) for arm in found.arms for p in arm.fronts)
    )
    if not planes and found.points:
        planes = _without_fronts(found)
    panels = [_panel(found, recipes, *plane) for plane in planes]
    return [panel for panel in panels if panel is not None]


def _without_fronts(found: Comparison) -> list[tuple[str, str, str]]:
    """Where no rate could be chosen: each gain with each item's first metric."""
    measures = found.points[0].measures
    gains = dict.fromkeys(m.item for m in measures if m.side == "gain")
    first: dict[str, str] = {}
    for m in measures:
        if m.side == "retention":
            first.setdefault(m.item, m.metric)
    return [(gain, item, metric) for gain in gains for item, metric in first.items()]


def _panel(
    found: Comparison, recipes: Mapping[tuple[str, float], str], gain: str, item: str, metric: str
) -> Panel | None:
    spots = [
        (point, gained, lost)
        for point in found.points
        if (gained := _figure(point, "gain", gain))
        and (lost := _figure(point, "retention", item, metric))
    ]
    if not spots:
        return None
    losses = [lost.figure.value or 0.0 for _, _, lost in spots]
    share = is_share(spots[0][1].metric)
    factor = 100.0 if share else 1.0
    gains = [factor * (gained.figure.value or 0.0) for _, gained, _ in spots]
    positive = [value for value in losses if value > _LEAST]
    is_log = metric == "kl" and bool(positive) and max(positive) > _WIDE * min(positive)
    x = (
        Axis.log(positive)
        if is_log
        else (Axis.root if metric == "kl" else Axis.linear)([0.0, *losses])
    )
    # A ruined run may have lost what the base could do: it stands at the edge.
    frame = Frame(width=420, height=320, left=46, bottom=40, x=x,
                  y=Axis.linear([0.0, max(max(gains), 1e-9)]))  # fmt: skip
    unit = "points" if share else "nats"
    spacing = "log" if is_log else "√" if metric == "kl" else ""
    label = f"KL to the base, {spacing} scale → further" if metric == "kl" else (
        f"{metric_name(metric)} lost → loses more"
    )  # fmt: skip
    parts = [frame.grid(label, f"{metric_name(spots[0][1].metric)} gained, {unit}")]
    plain_ones = [arm.is_lora for arm in found.arms]
    for place, arm in enumerate(found.arms):
        own = [spot for spot in spots if spot[0].arm == arm.name]
        if own:
            drawn = _draw(frame, place, own, factor, recipes)
            parts.append(group(f"m {colour_of(plain_ones, place)}", drawn))
    described = f"{len(spots)} points of {len(found.arms)} methods; all figures stand in the tables"
    heading = one_line(item)
    caption = f"against {metric_name(spots[0][1].metric)} on {one_line(gain)}"
    return Panel(heading, caption, frame.svg(parts, f"{heading} {caption}. {described}"))


def _draw(
    frame: Frame,
    place: int,
    spots: Sequence[tuple[Point, Measure, Measure]],
    factor: float,
    recipes: Mapping[tuple[str, float], str],
) -> list[Markup]:
    """The rates on a line; scaled copies as dots; the chosen one with its whiskers."""

    def at(gained: Measure, lost: Measure) -> tuple[float, float]:
        return frame.px(lost.figure.value or 0.0), frame.py(factor * (gained.figure.value or 0.0))

    parts: list[Markup] = []
    full = [(p, g, k) for p, g, k in spots if p.scale == 1.0]
    if len(full) > 1:
        parts.append(polyline([at(g, k) for _, g, k in full], "path"))
    for point, gained, lost in spots:
        x, y = at(gained, lost)
        hint = title(_hint(point, recipes.get((point.arm, point.rate), "")))
        if point.scale != 1.0:
            parts.append(element("circle", cx=x, cy=y, r=2.0, children=[hint], **{"class": "dot"}))
            continue
        if point.is_chosen:
            parts.append(_whiskers(frame, x, y, gained, lost, factor))
        half = 5.4 if point.is_chosen else 3.2
        kind = "spot" if point.is_chosen else "spot other"
        parts.append(group(kind, [hint, marker(place, x, y, half)]))
    return parts


def _whiskers(
    frame: Frame, x: float, y: float, gained: Measure, lost: Measure, factor: float
) -> Markup:
    path = ""
    if lost.figure.low is not None and lost.figure.high is not None:
        path += f"M{frame.px(lost.figure.low):.1f} {y:.1f}H{frame.px(lost.figure.high):.1f}"
    if gained.figure.low is not None and gained.figure.high is not None:
        low, high = (frame.py(factor * end) for end in (gained.figure.low, gained.figure.high))
        path += f"M{x:.1f} {low:.1f}V{high:.1f}"
    return element("path", d=path or "M0 0", **{"class": "whisker"})


def _hint(point: Point, recipe: str) -> str:
    seeds = "1 seed" if len(point.seeds) == 1 else f"{len(point.seeds)} seeds"
    turned = "" if point.scale == 1.0 else f", ΔW × {point.scale:g}"
    lines = [f"{point.arm}, rate {point.rate:g}{turned}, {seeds}"]
    for m in point.measures:
        if m.figure.value is not None:
            ends = ""
            if m.figure.low is not None and m.figure.high is not None:
                ends = f" ({plain(m.figure.low)} to {plain(m.figure.high)})"
            lines.append(
                f"{one_line(m.item)}, {metric_name(m.metric)}: {plain(m.figure.value)}{ends}"
            )
    if point.update_size is not None:
        lines.append(f"F_Δ {plain(point.update_size)}")
    return "\n".join([*lines, recipe] if recipe else lines)


def _figure(point: Point, side: str, item: str, metric: str | None = None) -> Measure | None:
    return next(
        (
            m
            for m in point.measures
            if m.side == side and m.item == item and metric in (None, m.metric)
            and m.figure.value is not None
        ),
        None,
    )  # fmt: skip
