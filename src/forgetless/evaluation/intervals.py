"""95 % intervals of what is 0 or 1 by row: shares, and changes of shares paired by row.

Resampling rows fails here: 0 of 100 rows gives [0, 0], and four rows lost of 200 with none gained
look significant, while the exact test of McNemar says p = 0.125.

Sources: Wilson 1927 and Clopper and Pearson 1934 (both as in Newcombe 1998, doi
10.1002/(SICI)1097-0258(19980430)17:8<857); Tango 1998 for the paired score interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from forgetless.evaluation.bootstrap import bootstrap_mean
from forgetless.evaluation.results import Estimate

_Z = 1.959963984540054
# With fewer rows that differ, no exact test of signs reaches 5 %: 2 / 2⁵ = 0.0625.
_FEWEST_DISCORDANT = 6


def is_binary(values: NDArray[np.float64]) -> bool:
    """Whether every value is 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def share_level(values: NDArray[np.float64]) -> Estimate:
    """Mean of scores between 0 and 1: Wilson's interval where all are 0 or 1, else bootstrap."""
    rows = len(values)
    if rows == 1 or not is_binary(values):
        return bootstrap_mean(values, bounds=(0.0, 1.0), is_change=False)
    low, high = wilson(int(values.sum()), rows)
    return Estimate(mean=float(values.mean()), low=low, high=high, n=rows)


def share_change(before: NDArray[np.float64], after: NDArray[np.float64]) -> Estimate:
    """Mean of `after - before`, paired by row.

    Where all scores are 0 or 1 the interval is that of `paired_change`. Other scores are resampled;
    where fewer than 6 rows differ the interval also covers the one that counts each as a whole row.
    """
    difference = after - before
    rows = len(difference)
    if rows == 1:
        return bootstrap_mean(difference, bounds=(-1.0, 1.0))
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    low, high = paired_change(gained, lost, rows)
    if is_binary(before) and is_binary(after):
        return Estimate(mean=(gained - lost) / rows, low=low, high=high, n=rows)
    estimate = bootstrap_mean(difference, bounds=(-1.0, 1.0))
    if gained + lost >= _FEWEST_DISCORDANT:
        return estimate
    return estimate.model_copy(
        update={"low": min(low, estimate.low), "high": max(high, estimate.high)}
    )


def wilson(count: int, rows: int) -> tuple[float, float]:
    """Wilson's score interval of `count` of `rows`."""
    share, shrink = count / rows, 1 + _Z**2 / rows
    middle = (share + _Z**2 / (2 * rows)) / shrink
    half = _Z * math.sqrt(share * (1 - share) / rows + _Z**2 / (4 * rows**2)) / shrink
    low = 0.0 if count == 0 else max(0.0, middle - half)
    return low, 1.0 if count == rows else min(1.0, middle + half)


def clopper_pearson(count: int, rows: int) -> tuple[float, float]:
    """The exact interval of `count` of `rows`: both binomial tails at 2.5 %."""
    low = float(betaincinv(count, rows - count + 1, 0.025)) if count > 0 else 0.0
    high = float(betaincinv(count + 1, rows - count, 0.975)) if count < rows else 1.0
    return low, high


def paired_change(gained: int, lost: int, rows: int) -> tuple[float, float]:
    """Interval of (gained - lost) / rows, where the other rows did not change.

    The wider of Tango's score interval, which has a width even where no row changed, and of the
    exact one given how many rows changed: so it leaves out 0 only where the exact test of McNemar
    is significant.
    """
    low, high = _tango(gained, lost, rows)
    changed = gained + lost
    if changed:
        exact_low, exact_high = clopper_pearson(gained, changed)
        low = min(low, (2 * exact_low - 1) * changed / rows)
        high = max(high, (2 * exact_high - 1) * changed / rows)
    return low, high


def _tango(gained: int, lost: int, rows: int) -> tuple[float, float]:
    """Differences at which the score statistic is ±1.96."""
    share = (gained - lost) / rows

    def score(delta: float) -> float:
        linear = -gained - lost + (2 * rows - gained + lost) * delta
        constant = -lost * delta * (1 - delta)
        root = math.sqrt(max(linear**2 - 8 * rows * constant, 0.0))
        nuisance = max((root - linear) / (4 * rows), 0.0)
        variance = rows * (2 * nuisance + delta * (1 - delta))
        distance = gained - lost - rows * delta
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    # The statistic falls as delta grows.
    low = -1.0 if share <= -1 else _root(lambda d: _Z - score(d), -1.0, share)
    high = 1.0 if share >= 1 else _root(lambda d: -_Z - score(d), share, 1.0)
    return low, high


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function crosses 0, by halving."""
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
