"""What a family of runs loses at a given gain: between two measured points it is interpolated.

The root of a KL is interpolated, linear in the gain: KL grows about as the square of the distance
from the base, so that KL itself would be overstated between two points. Other losses are
interpolated as they are.
"""

# Shape letters in this file: P = points of a path, K = resamples.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def loss_at(gains_PK: Array, losses_PK: Array, target_K: Array, *, is_divergence: bool) -> Array:
    """Loss where a path first reaches a gain.

    Args:
        gains_PK: Along the path, which begins at the base: gain 0, loss 0, not among the points.
        losses_PK: Losses of the same points.
        target_K: Gain to be reached, positive.
        is_divergence: Whether the losses are KLs.

    Returns:
        (K,); NaN where the path does not reach the gain, or the target is not positive.
    """
    turn = np.sqrt if is_divergence else np.asarray
    floor = 0.0 if is_divergence else -np.inf
    gains_PK = np.concatenate([np.zeros_like(gains_PK[:1]), gains_PK])
    paths_PK = turn(np.maximum(np.concatenate([np.zeros_like(losses_PK[:1]), losses_PK]), floor))
    found_K = np.full(target_K.shape, np.nan)
    for step in range(1, len(gains_PK)):
        below_K, above_K = gains_PK[step - 1], gains_PK[step]
        here_K = np.isnan(found_K) & (below_K < target_K) & (target_K <= above_K)
        with np.errstate(divide="ignore", invalid="ignore"):
            share_K = (target_K - below_K) / (above_K - below_K)
            value_K = paths_PK[step - 1] + share_K * (paths_PK[step] - paths_PK[step - 1])
        found_K = np.where(here_K, value_K, found_K)
    found_K = np.where(target_K > 0, found_K, np.nan)
    return found_K**2 if is_divergence else found_K


def envelope(
    paths: Sequence[tuple[Array, Array]], target_K: Array, *, is_divergence: bool
) -> Array:
    """The least loss at a gain over several paths (gains, losses); NaN where none reaches it."""
    found = [
        loss_at(gains_PK, losses_PK, target_K, is_divergence=is_divergence)
        for gains_PK, losses_PK in paths
    ]
    stacked = np.stack([np.where(np.isnan(one), np.inf, one) for one in found])
    least_K = stacked.min(0)
    return np.where(np.isinf(least_K), np.nan, least_K)
