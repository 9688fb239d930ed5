"""The law of update size over all arms, and who beats it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgetless.experiments.compare.arms import Arm
from forgetless.experiments.compare.axes import Axis
from forgetless.experiments.compare.figures import Figures, as_interval
from forgetless.experiments.compare.law import FEWEST_POINTS, explained, residual
from forgetless.experiments.compare.results import Law, LawResidual
from forgetless.experiments.compare.sampling import Figure, combine


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
    points: list[tuple[str, Figure, Figure]] = []
    for arm in arms:
        for cell in arm.cells:
            lost, size = figures.of(cell, loss), figures.update_size(cell)
            if lost is not None and size is not None and lost.estimate > floor < size.estimate:
                points.append((arm.name, size, lost))
    if len(points) < FEWEST_POINTS:
        return None
    x_P, y_P = (np.log([p[i].estimate for p in points]) for i in (1, 2))
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
    names = list(dict.fromkeys(name for name, _, _ in points))
    found = {name: _residual(points, name, loss, floor) for name in names}
    return law, {name: one for name, one in found.items() if one is not None}


def _residual(
    points: Sequence[tuple[str, Figure, Figure]], name: str, loss: Axis, floor: float
) -> LawResidual | None:
    own_P = np.array([arm == name for arm, _, _ in points])
    number = len(points)

    def of(*flat: np.ndarray) -> np.ndarray:
        x_PK = np.log(np.stack(flat[:number]))
        y_PK = np.log(np.maximum(np.stack(flat[number:]), floor))
        return residual(x_PK, y_PK, own_P)

    figure = combine(of, *(p[1] for p in points), *(p[2] for p in points))
    if not np.isfinite(figure.estimate):
        return None
    ends = figure.interval()
    x_P, y_P = (np.log([p[i].estimate for p in points]) for i in (1, 2))
    scatter = explained(x_P[~own_P], y_P[~own_P])[2]
    beats = ends is not None and ends[1] < 0 and figure.estimate < -2 * scatter
    return LawResidual(
        item=loss.item,
        metric=loss.metric,
        factor=as_interval(
            float(np.exp(figure.estimate)),
            None if ends is None else (float(np.exp(ends[0])), float(np.exp(ends[1]))),
        ),
        beats=beats,
    )
