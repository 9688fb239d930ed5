"""SVG by hand: escaped elements, axes with round ticks, a frame that maps data to user units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from forgetless.escaping import clean
from forgetless.experiments.numbers import plain

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def element(name: str, children: Sequence[str | Markup] = (), **attributes: str | float) -> Markup:
    """One element; attribute values and text children are escaped, Markup children are kept."""
    pairs = ""
    for key, value in attributes.items():
        text = clean(value) if isinstance(value, str) else f"{value:.1f}"
        pairs += f' {key.replace("_", "-")}="{escape(text)}"'
    inner = "".join(str(c if isinstance(c, Markup) else escape(clean(c))) for c in children)
    return Markup(f"<{name}{pairs}>{inner}</{name}>" if inner else f"<{name}{pairs}/>")


def group(kind: str, children: Sequence[str | Markup]) -> Markup:
    """A `g` with a class."""
    return element("g", children, **{"class": kind})


def title(text: str) -> Markup:
    """What a pointer over the parent shows, and a screen reader says."""
    return element("title", [text])


def polyline(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=path, **{"class": kind})


def marker(index: int, x: float, y: float, half: float = 4.6) -> Markup:
    """The sign of the run with this index: shape and colour both tell runs apart."""
    h = half
    shapes = (
        None,
        f"M{x - h:.1f} {y - h:.1f}h{2 * h:.1f}v{2 * h:.1f}h{-2 * h:.1f}z",
        f"M{x:.1f} {y - 1.3 * h:.1f}l{1.3 * h:.1f} {1.3 * h:.1f}l{-1.3 * h:.1f} {1.3 * h:.1f}"
        f"l{-1.3 * h:.1f} {-1.3 * h:.1f}z",
        f"M{x:.1f} {y - 1.3 * h:.1f}l{1.3 * h:.1f} {2.2 * h:.1f}h{-2.6 * h:.1f}z",
        f"M{x:.1f} {y + 1.3 * h:.1f}l{1.3 * h:.1f} {-2.2 * h:.1f}h{-2.6 * h:.1f}z",
    )
    shape = shapes[index % len(shapes)]
    if shape is None:
        return element("circle", cx=x, cy=y, r=half, **{"class": "mark"})
    return element("path", d=shape, **{"class": "mark"})


def key_sign(index: int, colour: str) -> Markup:
    """The marker alone, for legends and table rows."""
    inner = group(f"m {colour}", [marker(index, 8.0, 8.0)])
    return element("svg", [inner], viewBox="0 0 16 16", aria_hidden="true", **{"class": "key"})


def base_key() -> Markup:
    """The cross that stands for the base model, for legends."""
    cross = group("base", [element("path", d="M4 8h8M8 4v8")])
    return element("svg", [cross], viewBox="0 0 16 16", aria_hidden="true", **{"class": "key"})


@dataclass(frozen=True)
class Axis:
    """A range, how it is spaced, and its ticks."""

    low: float
    high: float
    spacing: Literal["linear", "root", "log"]
    ticks: tuple[float, ...]

    @classmethod
    def linear(cls, values: Sequence[float]) -> Axis:
        """Even spacing, from a round value below to one above."""
        low, high = min(values), max(values)
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        step = _round_step((high - low) / 4)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(step * k for k in range(first, last + 1))
        return cls(ticks[0], ticks[-1], "linear", ticks)

    @classmethod
    def root(cls, values: Sequence[float]) -> Axis:
        """Square-root spacing from 0: KL grows with the square of a small change."""
        high = max(*values, 1e-12) * 1.08
        ticks = {0.0}
        for share in (0.06, 0.25, 0.55, 1.0):
            wanted = share * high
            power = 10.0 ** math.floor(math.log10(wanted))
            ticks.add(max(m * power for m in (1.0, 2.0, 3.0, 5.0) if m * power <= wanted * 1.0001))
        return cls(0.0, high, "root", tuple(_apart(sorted(ticks), high)))

    @classmethod
    def log(cls, values: Sequence[float]) -> Axis:
        """Logarithmic spacing over whole decades, 12 at most; values must be positive."""
        high = math.ceil(math.log10(max(values)) + 1e-9)
        low = max(math.floor(math.log10(min(values)) - 1e-9), high - 12)
        low = min(low, high - 1)
        every = max(1, math.ceil((high - low) / 4))
        ticks = tuple(10.0**k for k in range(low, high + 1) if (high - k) % every == 0)
        return cls(10.0**low, 10.0**high, "log", ticks)

    def share(self, value: float) -> float:
        """Where a value stands between both ends, kept inside."""
        low, value, high = (self._spaced(v) for v in (self.low, value, self.high))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def label(self, value: float) -> str:
        """A tick's text."""
        if self.spacing == "log":
            return _power(value)
        if value == 0 or abs(value) < 1e-9 * (self.high - self.low):
            return "0"
        size = abs(value)
        return ("−" if value < 0 else "") + (f"{size:g}" if 1e-3 <= size < 1e5 else _short(size))

    def _spaced(self, value: float) -> float:
        if self.spacing == "linear":
            return value
        if self.spacing == "root":
            return math.sqrt(max(value, 0.0))
        return math.log10(max(value, self.low))


@dataclass(frozen=True)
class Frame:
    """A plot area inside an SVG of given size."""

    width: float
    height: float
    left: float
    bottom: float
    x: Axis
    y: Axis
    top: float = 22.0
    right: float = 12.0

    def px(self, value: float) -> float:
        """Data to horizontal position."""
        return self.left + self.x.share(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Data to vertical position."""
        floor = self.height - self.bottom
        return floor - self.y.share(value) * (floor - self.top)

    def grid(self, x_label: str, y_label: str) -> Markup:
        """Hair lines, tick texts, and the names of both axes."""
        floor, end = self.height - self.bottom, self.width - self.right
        parts = []
        for tick in self.y.ticks:
            y = self.py(tick)
            zero = " zero" if tick == 0 else ""
            parts.append(
                element("path", d=f"M{self.left:.1f} {y:.1f}H{end:.1f}", **{"class": f"hair{zero}"})
            )
            parts.append(
                element(
                    "text",
                    [self.y.label(tick)],
                    x=self.left - 6,
                    y=y + 3.5,
                    **{"class": "tick end"},
                )
            )
        for tick in self.x.ticks:
            x = self.px(tick)
            parts.append(element("path", d=f"M{x:.1f} {floor:.1f}v4", **{"class": "hair"}))
            parts.append(
                element("text", [self.x.label(tick)], x=x, y=floor + 15, **{"class": "tick mid"})
            )
        if x_label:
            parts.append(
                element("text", [x_label], x=end, y=self.height - 6, **{"class": "axis end"})
            )
        if y_label:
            parts.append(element("text", [y_label], x=0.0, y=11.0, **{"class": "axis"}))
        return group("grid", parts)

    def svg(self, children: Sequence[Markup], description: str) -> Markup:
        """The whole picture, with a text for those who cannot see it."""
        return element(
            "svg",
            children,
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            role="img",
            aria_label=description,
            **{"class": "chart"},
        )


def _apart(ticks: Sequence[float], high: float) -> list[float]:
    """Ticks of a root axis whose texts have room: each a sixth of the width from the one before."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or math.sqrt(kept[-1] / high) - math.sqrt(tick / high) >= 1 / 6:
            kept.append(tick)
    return kept[::-1]


def _short(size: float) -> str:
    """A very small or very large tick: 5e-4 rather than 5.0e-4."""
    return plain(size).replace(".0e", "e")


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * 0.999)
