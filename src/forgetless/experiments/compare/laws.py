"""The law of update size over all arms, and who beats it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgetless.experiments.compare.arms import Arm
from forgetless.experiments.compare.axes import Axis
from forgetless.experiments.compare.figures import Figures, as_interval
from forgetless.experiments.compare.law import FEWEST_POINTS, explained, residual
from forgetless.experiments.compare.results import Law, LawResidual
from forgetless.experiments.compare.sampling import Figure, combine


class _Point(NamedTuple):
    arm: str
    size: Figure
    lost: Figure


def law_of(
    figures: Figures, arms: Sequence[Arm], loss: Axis, floor: float
) -> tuple[Law, dict[str, LawResidual]] | None:
    """Fit a KL on F_Δ over all arms and rates at full scale.

    Args:
        figures: Of the comparison.
        arms: All of them.
        loss: A KL: other losses may be negative, and have no logarithm.
        floor: KLs below it are rounding, and left out.

    Returns:
        The law, and the residual of each arm with a point; None with fewer than four points.
    """
    points: list[_Point] = []
    for arm in arms:
        for cell in arm.cells:
            lost, size = figures.of(cell, loss), figures.update_size(cell)
            if lost is not None and size is not None and lost.estimate > floor < size.estimate:
                points.append(_Point(arm.name, size, lost))
    if len(points) < FEWEST_POINTS:
        return None
    x_P, y_P = _logarithms(points)
    if np.ptp(x_P) == 0:
        return None
    slope, r_squared, scatter = explained(x_P, y_P)
    law = Law(
        item=loss.item,
        metric=loss.metric,
        slope=slope,
        r_squared=r_squared,
        scatter=scatter,
        points=len(points),
    )
    names = list(dict.fromkeys(point.arm for point in points))
    found = {name: _residual(points, name, loss, floor) for name in names}
    return law, {name: one for name, one in found.items() if one is not None}


def _residual(points: Sequence[_Point], name: str, loss: Axis, floor: float) -> LawResidual | None:
    own_P = np.array([point.arm == name for point in points])
    number = len(points)

    def of(*flat: np.ndarray) -> np.ndarray:
        x_PK = np.log(np.stack(flat[:number]))
        y_PK = np.log(np.maximum(np.stack(flat[number:]), floor))
        return residual(x_PK, y_PK, own_P)

    figure = combine(of, *(p.size for p in points), *(p.lost for p in points))
    if not np.isfinite(figure.estimate):
        return None
    ends = figure.interval()
    x_P, y_P = _logarithms(points)
    scatter = explained(x_P[~own_P], y_P[~own_P])[2]
    others_P = x_P[~own_P]  # beyond them the line is a guess
    is_inside = bool(others_P.min() <= x_P[own_P].mean() <= others_P.max())
    beats = is_inside and ends is not None and ends[1] < 0 and figure.estimate < -2 * scatter
    return LawResidual(
        item=loss.item,
        metric=loss.metric,
        factor=as_interval(
            float(np.exp(figure.estimate)),
            None if ends is None else (float(np.exp(ends[0])), float(np.exp(ends[1]))),
        ),
        beats=beats,
    )


def _logarithms(points: Sequence[_Point]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of F_Δ (P,) and loss (P,)."""
    sizes = np.array([point.size.estimate for point in points])
    losses = np.array([point.lost.estimate for point in points])
    return np.log(sizes), np.log(losses)
