"""What is compared: a metric of an evaluation item, and its figures with their signs turned.

A gain is turned so that more is better, a loss so that more is worse. KL is a loss as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgetless.escaping import one_line
from forgetless.evaluation.results import Estimate, EvaluationReport, ItemResult, Side
from forgetless.experiments.numbers import metric_name
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
class Axis:
    """One metric of one item."""

    side: Side
    item: str
    metric: str

    @property
    def is_divergence(self) -> bool:
        """Whether it is a KL: never negative, and growing as the square of a small change."""
        return self.metric == "kl"

    @property
    def name(self) -> str:
        """`KL on facts`."""
        return f"{metric_name(self.metric)} on {one_line(self.item)}"

    def figure(self, report: EvaluationReport) -> Estimate | None:
        """Gain or loss with its interval over rows; None where it was not measured, or is NaN."""
        result = metric_of(report, self.item, self.side, self.metric)
        if result is None:
            return None
        found = improvement(result) if self.side == "gain" else loss(result)
        return found if found is not None and math.isfinite(found.mean) else None

    def by_row(
        self, report: EvaluationReport
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Gain or loss of every row (N,), and the rows' weights (N,).

        None where the record holds no figures by row, as records of groups of tasks and of earlier
        versions.
        """
        item = self._item(report)
        values = item.row_values.get(self.metric) if item else None
        if item is None or values is None or not values.tuned:
            return None
        change_N = np.array(values.tuned)
        if not self.is_divergence:
            if len(values.base) != len(values.tuned):
                return None
            change_N = change_N - np.array(values.base)
        more_is_more = item.metrics[self.metric].higher_is_better == (self.side == "gain")
        sign = 1.0 if self.is_divergence or more_is_more else -1.0
        weights_N = np.array(values.weights) if values.weights else np.ones(len(change_N))
        return sign * change_N, weights_N

    def _item(self, report: EvaluationReport) -> ItemResult | None:
        return next((i for i in report.items if i.name == self.item and i.side == self.side), None)


def gain_axes(runs: Sequence[Run]) -> list[Axis]:
    """One axis an item: NLL where all runs have it, which scaled-down copies have, too."""
    found = []
    for item in items_of(runs, "gain"):
        nll = Axis("gain", item, "nll")
        metric = "nll" if _all_have(runs, nll) else gain_metric(runs, item)
        if metric is not None:
            found.append(Axis("gain", item, metric))
    return found


def further_gains(runs: Sequence[Run]) -> list[Axis]:
    """The metrics that a gain has beside that of its axis: shares of right answers and the like."""
    chosen = gain_axes(runs)
    found = []
    for run in runs:
        for item in run.record.evaluation.items:
            for metric in item.metrics if item.side == "gain" else ():
                axis = Axis("gain", item.name, metric)
                if axis not in chosen and axis not in found and metric != "kl":
                    found.append(axis)
    return [axis for axis in found if _all_have(runs, axis)]


def loss_axes(runs: Sequence[Run]) -> list[Axis]:
    """Every metric of every retention item that all runs have; each item's KL goes first."""
    return [
        Axis("retention", item, metric)
        for item in items_of(runs, "retention")
        for metric in retention_metrics(runs, item)
    ]


def left_out(runs: Sequence[Run], used: Sequence[Axis]) -> list[str]:
    """Which metrics are compared nowhere because a run lacks them, in words."""
    metrics = dict.fromkeys(
        Axis(item.side, item.name, metric)
        for run in runs
        for item in run.record.evaluation.items
        for metric in item.metrics
        if (item.side, metric) != ("gain", "kl")
    )
    found = []
    for axis in metrics:
        lacking = [run.name for run in runs if axis.figure(run.record.evaluation) is None]
        if axis not in used and lacking:
            who = "1 run has" if len(lacking) == 1 else f"{len(lacking)} runs have"
            found.append(
                f"Left out: {axis.name}; {who} no figure of it, {one_line(lacking[0])} for one."
            )
    return found


def leading(axes: Sequence[Axis]) -> list[Axis]:
    """The first axis of each item: what is forgotten in one figure."""
    first: dict[str, Axis] = {}
    for axis in axes:
        first.setdefault(axis.item, axis)
    return list(first.values())


def _all_have(runs: Sequence[Run], axis: Axis) -> bool:
    return all(axis.figure(run.record.evaluation) is not None for run in runs)
