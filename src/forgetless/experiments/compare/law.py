"""Retention as a function of the size of the update: log loss on log F_Δ, fitted over all arms.

A public study of 1,035 runs found that update size explains most of what is forgotten, whatever the
method. An arm beats that law if it loses less than other arms whose updates are as large. Its
residual is from a line fitted without it, so that it cannot bend the law to itself.
"""

# Shape letters in this file: P = points, K = resamples.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FEWEST_POINTS = 4  # of other arms


def line(x_PK: Array, y_PK: Array) -> tuple[Array, Array]:
    """Least squares in each resample: intercept (K,) and slope (K,)."""
    x_mean_K, y_mean_K = x_PK.mean(0), y_PK.mean(0)
    spread_K = ((x_PK - x_mean_K) ** 2).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope_K = ((x_PK - x_mean_K) * (y_PK - y_mean_K)).sum(0) / spread_K
    return y_mean_K - slope_K * x_mean_K, slope_K


def residual(x_PK: Array, y_PK: Array, own: NDArray[np.bool_]) -> Array:
    """Mean distance of an arm's points from the line of all others, in log loss.

    Args:
        x_PK: Log F_Δ.
        y_PK: Log loss.
        own: (P,), which points are the arm's.

    Returns:
        (K,); NaN with fewer than four other points.
    """
    if (~own).sum() < FEWEST_POINTS:
        return np.full(x_PK.shape[1], np.nan)
    intercept_K, slope_K = line(x_PK[~own], y_PK[~own])
    mean_K: Array = (y_PK[own] - intercept_K - slope_K * x_PK[own]).mean(0)
    return mean_K


def explained(x_P: Array, y_P: Array) -> tuple[float, float, float]:
    """Slope, R² and scatter (standard deviation of the residuals, n - 2) of the line of all."""
    intercept, slope = line(x_P[:, None], y_P[:, None])
    left_P = y_P - intercept - slope * x_P
    total = float(((y_P - y_P.mean()) ** 2).sum())
    squares = float((left_P**2).sum())
    r_squared = 1 - squares / total if total > 0 else float("nan")
    return float(slope[0]), r_squared, float(np.sqrt(squares / max(len(x_P) - 2, 1)))
