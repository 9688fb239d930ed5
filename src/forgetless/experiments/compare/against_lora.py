"""Each arm against plain LoRA at the same gain: at another rate, with weight decay, turned down."""

# Shape letters in this file: P = points of a path, K = resamples.

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from forgetless.experiments.compare.arms import Arm, Cell
from forgetless.experiments.compare.axes import Axis
from forgetless.experiments.compare.figures import Figures, as_interval, lora_family, scales_of
from forgetless.experiments.compare.matching import envelope
from forgetless.experiments.compare.results import Interval, Matched, Outcome
from forgetless.experiments.compare.sampling import Figure, combine

Array = NDArray[np.float64]
Path = list[tuple[Figure, Figure]]  # gain and loss, from the base on


class AgainstLoRA:
    """What plain LoRA loses at any gain, for one gain and one loss."""

    def __init__(
        self, figures: Figures, arms: Sequence[Arm], gain: Axis, loss: Axis, floor: float
    ) -> None:
        """Find LoRA's paths. KLs below `floor` are rounding, and count as that."""
        self._figures, self._gain, self._loss, self._floor = figures, gain, loss, floor
        family = lora_family(arms)
        self.scaled = [
            path
            for arm in family
            if arm.is_lora
            for cell in arm.cells
            if len(path := self._path([(cell, s) for s in scales_of(cell)])) > 1
        ]
        self.tuned = [
            path for arm in family if (path := self._path([(cell, 1.0) for cell in arm.cells]))
        ]

    def match(self, arm: Arm, cell: Cell, level: float) -> Matched | None:
        """Hold one cell against LoRA at the same gain.

        Args:
            arm: None of LoRA's family, which is what all others are held against.
            cell: Of the arm.
            level: Probability of the interval that decides; higher for many comparisons.

        Returns:
            None where LoRA, or the cell, was not measured.
        """
        gain, loss = self._figures.of(cell, self._gain), self._figures.of(cell, self._loss)
        every = [*self.scaled, *self.tuned]
        if gain is None or loss is None or not every or arm.decay is not None:
            return None
        most = combine(_largest, *(g for path in every for g, _ in path))
        ahead = combine(np.subtract, gain, most).interval(level)
        beyond = ahead is not None and ahead[0] > 0
        scaled, tuned, best = (
            self._ratio(paths, gain, loss) if paths else None
            for paths in (self.scaled, self.tuned, every)
        )
        assert best is not None, "there are paths"
        return Matched(
            gain=self._gain.item,
            item=self._loss.item,
            metric=self._loss.metric,
            is_ratio=self._loss.is_divergence,
            scaled=self._interval(scaled),
            tuned=self._interval(tuned),
            best=self._interval(best),
            beyond=beyond,
            outcome=self._outcome(gain, best, level, beyond=beyond),
        )

    def _outcome(self, gain: Figure, best: Figure, level: float, *, beyond: bool) -> Outcome:
        gained = gain.interval(level)
        if gained is None:
            return "unknown"
        if gained[0] <= 0:
            return "gained nothing"
        ends = best.interval(level)
        if ends is not None and ends[1] < 0:
            return "kept more"
        if beyond and (ends is None or ends[0] > 0):
            return "gained more"  # LoRA is nowhere at its gain
        if ends is None:
            return "unknown"
        return "lost more" if ends[0] > 0 else "unclear"

    def _ratio(self, paths: Sequence[Path], gain: Figure, loss: Figure) -> Figure:
        """Log of the ratio of KLs, or the difference of other losses."""
        lengths = [len(path) for path in paths]
        flat = [figure for path in paths for pair in path for figure in pair]
        divergence = self._loss.is_divergence

        def ratio(gain_K: Array, loss_K: Array, *others: Array) -> Array:
            rest, pairs = list(others), []
            for length in lengths:
                taken, rest = rest[: 2 * length], rest[2 * length :]
                pairs.append((np.stack(taken[::2]), np.stack(taken[1::2])))
            most_K = np.stack([gains_PK.max(0) for gains_PK, _ in pairs]).max(0)
            cost_K = envelope(pairs, np.minimum(gain_K, most_K), is_divergence=divergence)
            if not divergence:
                return loss_K - cost_K
            return np.log(np.maximum(loss_K, self._floor)) - np.log(np.maximum(cost_K, self._floor))

        return combine(ratio, gain, loss, *flat)

    def _interval(self, figure: Figure | None) -> Interval:
        if figure is None:
            return as_interval(float("nan"), None)
        turn: Callable[[float], float] = (
            (lambda v: float(np.exp(v))) if self._loss.is_divergence else float
        )
        ends = figure.interval()
        return as_interval(turn(figure.estimate), ends and (turn(ends[0]), turn(ends[1])))

    def _path(self, steps: Sequence[tuple[Cell, float]]) -> Path:
        path = []
        for cell, scale in steps:
            gain, loss = (self._figures.of(cell, a, scale) for a in (self._gain, self._loss))
            if gain is not None and loss is not None:
                path.append((gain, loss))
        return path


def _largest(*gains: Array) -> Array:
    most_K: Array = np.stack(gains).max(0)
    return most_K
