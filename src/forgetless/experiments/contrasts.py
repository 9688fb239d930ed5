"""One run against another on one metric of one item: the difference, and whether rows tell it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from forgetless.evaluation.pairing import difference
from forgetless.evaluation.results import Estimate, ItemResult, Side
from forgetless.experiments.numbers import change_text, is_share, range_text
from forgetless.experiments.runs import (
    Run,
    improvement,
    is_significant,
    kl_floor,
    loss,
    metric_of,
    rows_asked,
)

# Two gains are called the same where the paired interval of their difference lies within these, and
# within this part of the larger gain: a tenth of a small gain is no sameness.
MARGIN_SHARE = 0.05
MARGIN_NATS = 0.05
MARGIN_PART = 0.1

Sign = Literal[-1, 0, 1]


@dataclass(frozen=True)
class Contrast:
    """How much more (gained, or lost) the one run than the other.

    Attributes:
        ours: Gain or loss of the one run, more is more.
        theirs: The other's.
        paired: The difference on the same rows; None where only the two intervals can be compared.
        floor: Values up to this are rounding, and differences between two of them nothing.
    """

    item: str
    metric: str
    ours: Estimate
    theirs: Estimate
    paired: Estimate | None
    floor: float = -math.inf

    @property
    def sign(self) -> Sign:
        """1 where the first is larger, -1 where smaller, 0 where these rows cannot tell."""
        if max(self.ours.mean, self.theirs.mean) <= self.floor:
            return 0
        if self.paired is not None:
            if not is_significant(self.paired):
                return 0
            return 1 if self.paired.low > 0 else -1
        if min(self.ours.n, self.theirs.n) <= 1:
            return 0
        if self.ours.low > self.theirs.high:
            return 1
        return -1 if self.ours.high < self.theirs.low else 0

    @property
    def is_same(self) -> bool:
        """Whether the paired interval shows that both are equal up to the margin."""
        if self.paired is None or self.paired.n <= 1:
            return False
        return -self.margin < self.paired.low and self.paired.high < self.margin

    @property
    def margin(self) -> float:
        """Differences within ± this are called the same."""
        absolute = MARGIN_SHARE if is_share(self.metric) else MARGIN_NATS
        return min(absolute, MARGIN_PART * max(abs(self.ours.mean), abs(self.theirs.mean)))

    @property
    def interval(self) -> str:
        """`paired −17.0 to +1.0`; empty where the rows were not paired."""
        if self.paired is None:
            return ""
        text = range_text(self.metric, self.paired, change=True)
        return f"paired {text}" if text else ""

    @property
    def size(self) -> str:
        """The difference without its sign."""
        by = self.ours.mean - self.theirs.mean if self.paired is None else self.paired.mean
        return change_text(self.metric, abs(by)).lstrip("+").replace("pts", "points")


def contrast(run: Run, other: Run, item: str, side: Side, metric: str) -> Contrast | None:
    """Compare two runs; None where one of them was not measured on it."""
    ours, theirs = (_size(r, item, side, metric) for r in (run, other))
    if ours is None or theirs is None:
        return None
    floor = max(kl_floor(run), kl_floor(other)) if metric == "kl" else -math.inf
    return Contrast(item, metric, ours, theirs, _paired(run, other, item, side, metric), floor)


def _size(run: Run, item: str, side: Side, metric: str) -> Estimate | None:
    result = metric_of(run.record.evaluation, item, side, metric)
    if result is None:
        return None
    return improvement(result) if side == "gain" else loss(result)


def _paired(run: Run, other: Run, item: str, side: Side, metric: str) -> Estimate | None:
    ours, theirs = _item(run, item, side), _item(other, item, side)
    if ours is None or theirs is None or not _same_rows(run, other, item):
        return None
    a, b = ours.row_values.get(metric), theirs.row_values.get(metric)
    found = difference(metric, a, b) if a and b else None
    if found is None:
        return None
    more_is_more = ours.metrics[metric].higher_is_better == (side == "gain")
    if more_is_more:
        return found
    return Estimate(mean=-found.mean, low=-found.high, high=-found.low, n=found.n)


def _item(run: Run, name: str, side: Side) -> ItemResult | None:
    items = run.record.evaluation.items
    return next((i for i in items if i.name == name and i.side == side), None)


def _same_rows(run: Run, other: Run, item: str) -> bool:
    rows = [rows_asked(r, item) for r in (run, other)]
    return bool(rows[0]) and rows[0] == rows[1]
