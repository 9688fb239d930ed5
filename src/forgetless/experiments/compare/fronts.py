"""Who is on the front, how surely, and how much of the plane each arm dominates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgetless.experiments.compare.arms import Arm, Cell
from forgetless.experiments.compare.axes import Axis
from forgetless.experiments.compare.figures import Figures, as_interval, scales_of
from forgetless.experiments.compare.front import hypervolume, on_front
from forgetless.experiments.compare.results import Interval, OnFront
from forgetless.experiments.compare.sampling import Figure, combine


def fronts_of(
    figures: Figures,
    chosen: Sequence[tuple[Arm, Cell]],
    lora: Cell | None,
    gain: Axis,
    loss: Axis,
) -> tuple[dict[str, OnFront], float] | None:
    """The front of the chosen cells in one plane, by arm, and the hypervolume of all arms.

    A KL is taken by its root, as charts draw it: by itself it would let the largest losses decide.

    Returns:
        None where fewer than two arms were measured, or nothing was gained.
    """
    found = [
        (arm, cell, gained, lost)
        for arm, cell in chosen
        if (gained := figures.of(cell, gain)) is not None
        and (lost := figures.of(cell, loss)) is not None
    ]
    if len(found) < 2:
        return None
    gains_A, losses_A = (np.array([[row[i].estimate] for row in found]) for i in (2, 3))  # type: ignore[union-attr]
    front_A = on_front(gains_A, losses_A)[:, 0]
    both = on_front(
        np.stack([row[2].both for row in found]), np.stack([row[3].both for row in found])
    )
    points = {arm.name: _points(figures, arm, gain, loss) for arm, _ in chosen}
    most_gain = max(g.estimate for pairs in points.values() for g, _ in pairs)
    limit = figures.of(lora, loss) if lora is not None else None
    # LoRA's loss; where it lost nothing, the largest; where nobody did, the width does not matter.
    widths = ([limit.estimate] if limit is not None else []) + [float(losses_A.max()), 1.0]
    most_loss = next(width for width in widths if width > 0)
    if not most_gain > 0:
        return None

    def area(pairs: Sequence[tuple[Figure, Figure]]) -> Figure:
        def of(*flat: np.ndarray) -> np.ndarray:
            losses_PK = np.maximum(np.stack(flat[1::2]), 0)
            share = np.sqrt(losses_PK / most_loss) if loss.is_divergence else losses_PK / most_loss
            return hypervolume(np.stack(flat[::2]), share, most_gain, 1.0)

        return combine(of, *(figure for pair in pairs for figure in pair))

    everything = [pair for pairs in points.values() for pair in pairs]
    total = area(everything).estimate
    result = {}
    for place, (arm, _, _, _) in enumerate(found):
        own = area(points[arm.name])
        others = [pair for name, pairs in points.items() if name != arm.name for pair in pairs]
        result[arm.name] = OnFront(
            gain=gain.item,
            item=loss.item,
            metric=loss.metric,
            is_on_front=bool(front_A[place]),
            probability=float(both[place].mean()),
            hypervolume=_share(own),
            alone=max(total - area(others).estimate, 0.0),
        )
    return result, total


def _share(figure: Figure) -> Interval:
    """An interval of what lies between 0 and 1."""
    ends = figure.interval()
    inside = None if ends is None else (max(ends[0], 0.0), min(ends[1], 1.0))
    return as_interval(figure.estimate, inside)


def _points(figures: Figures, arm: Arm, gain: Axis, loss: Axis) -> list[tuple[Figure, Figure]]:
    """All rates and scales of an arm."""
    found = []
    for cell in arm.cells:
        for scale in scales_of(cell):
            gained, lost = figures.of(cell, gain, scale), figures.of(cell, loss, scale)
            if gained is not None and lost is not None:
                found.append((gained, lost))
    return found
