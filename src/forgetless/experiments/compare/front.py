"""Pareto front and hypervolume in two dimensions: more gain is better, more loss is worse."""

# Shape letters in this file: A = arms, K = resamples, P = points.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def on_front(gains_AK: Array, losses_AK: Array) -> NDArray[np.bool_]:
    """Which points no other one dominates, in each resample.

    A point dominates another if it gains no less and loses no more, and is better in one of the
    two. Equal points do not dominate each other. A point with a NaN is on no front and dominates
    none.

    Args:
        gains_AK: Gains.
        losses_AK: Losses.

    Returns:
        (A, K).
    """
    known_AK = np.isfinite(gains_AK) & np.isfinite(losses_AK)
    found_AK = known_AK.copy()
    for other in range(len(gains_AK)):
        gain_K, loss_K = gains_AK[other], losses_AK[other]
        no_worse_AK = (gain_K >= gains_AK) & (loss_K <= losses_AK)
        better_AK = (gain_K > gains_AK) | (loss_K < losses_AK)
        found_AK &= ~(no_worse_AK & better_AK & known_AK[other])
    return found_AK


def hypervolume(gains_PK: Array, losses_PK: Array, most_gain: float, most_loss: float) -> Array:
    """Share of the rectangle up to `most_gain` and `most_loss` that the points dominate.

    The point of reference is the base's gain, 0, at `most_loss`: 0 says that nothing is gained at a
    smaller loss, 1 that `most_gain` costs nothing. Gains and losses outside are moved to its edge.

    Args:
        gains_PK: Gains of P points.
        losses_PK: Their losses.
        most_gain: Positive.
        most_loss: Positive.

    Returns:
        (K,), between 0 and 1.
    """
    assert most_gain > 0, "the rectangle has a height"
    assert most_loss > 0, "the rectangle has a width"
    heights_PK = np.clip(np.nan_to_num(gains_PK, nan=0.0) / most_gain, 0, 1)
    starts_PK = np.clip(np.nan_to_num(losses_PK, nan=most_loss) / most_loss, 0, 1)
    order_PK = np.argsort(starts_PK, axis=0)
    starts_PK = np.take_along_axis(starts_PK, order_PK, 0)
    # The highest point so far, from the least loss to the largest: a staircase.
    heights_PK = np.maximum.accumulate(np.take_along_axis(heights_PK, order_PK, 0), 0)
    ends_PK = np.concatenate([starts_PK[1:], np.ones_like(starts_PK[:1])])
    area_K: Array = ((ends_PK - starts_PK) * heights_PK).sum(0)
    return area_K
