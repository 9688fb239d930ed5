"""Percentile bootstrap over rows: 95 % intervals of means, weighted means and paired changes."""

# Shape letters in this file: N = rows, K = resamples.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from forgetless.evaluation.results import Estimate

RESAMPLES = 2000
_BLOCK = 2**21  # row indices drawn at a time: 16 MiB


def bootstrap_mean(
    values: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of rows and its 95 % interval.

    With weights the mean is Σ w v / Σ w, and both sums are resampled together (a ratio estimator):
    with v the mean NLL of a row and w its tokens it is the NLL per token. A change is paired by
    passing the differences by row.

    Args:
        values: One figure a row, finite.
        weights: Positive weights; all equal where not given.
        seed: Seed of the resampling.
        resamples: K.

    Returns:
        Mean, 2.5 % and 97.5 % percentile, and N. Both ends are the mean where N is 1.
    """
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, np.float64)
    rows = len(values_N)
    assert rows > 0, "an estimate needs a row"
    assert weights_N.shape == values_N.shape, "one weight a row"
    assert bool((weights_N > 0).all()), "rows that do not count must be left out"
    weighted_N = values_N * weights_N
    mean = float(weighted_N.sum() / weights_N.sum())
    if rows == 1:
        return Estimate(mean=mean, low=mean, high=mean, n=1)
    means_K = np.concatenate(
        [
            weighted_N[index_KN].sum(1) / weights_N[index_KN].sum(1)
            for index_KN in _resampled(rows, resamples, seed)
        ]
    )
    low, high = np.quantile(means_K, [0.025, 0.975])
    # Rounding must not push the mean of equal rows out of its own interval.
    return Estimate(mean=mean, low=min(float(low), mean), high=max(float(high), mean), n=rows)


def _resampled(rows: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        yield generator.integers(rows, size=(min(block, resamples - start), rows))
