"""A figure and its noise: over evaluation rows, which all runs share, and over seeds.

Each figure is carried with its values under resampled rows and under resampled seeds. Whatever is
computed from figures (a ratio, an interpolated cost, a residual) is computed for every resample as
well, so that what is common to two methods cancels: they answer the same rows, and where their
seeds are the same, in the same order of train rows.

The two variances add up: rows are drawn for the mean over seeds, seeds for all rows. Degrees of
freedom are Satterthwaite's (1946, doi 10.2307/3002019), so that two or three seeds make an
interval as wide as Student's. Resampled seeds are spread by √(n / (n-1)), as resampling n values
has a variance too small by that.
"""

# Shape letters in this file: S = seeds, N = rows, K = resamples.

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from forgetless.errors import ArtefactError
from forgetless.evaluation.results import Estimate, EvaluationReport
from forgetless.experiments.compare.axes import Axis

Array = NDArray[np.float64]
RESAMPLES = 1000
_NORMAL = 1.959964  # half of a 95 % interval, in standard deviations
_MOST_MISSING = 0.2  # resamples in which a figure may not exist


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure with its values under resampling.

    Attributes:
        estimate: From all rows and seeds; NaN where it does not exist.
        rows: (K,), other rows.
        seeds: (K,), other seeds.
        both: (K,), other rows and seeds.
        num_rows: 1 where rows add no noise.
        num_seeds: 1 says that nothing is known of other seeds.
    """

    estimate: float
    rows: Array
    seeds: Array
    both: Array
    num_rows: int
    num_seeds: int

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Where the figure lies for other rows and seeds.

        Args:
            level: Probability, both ends together.

        Returns:
            None where nothing tells: one row and one seed, or a figure that does not exist in more
            than a fifth of the resamples.
        """
        variances = [_variance(draws_K) for draws_K in (self.rows, self.seeds)]
        if not math.isfinite(self.estimate) or not all(map(math.isfinite, variances)):
            return None
        freedoms = [max(self.num_rows - 1, 1), max(self.num_seeds - 1, 1)]
        known = [self.num_rows > 1, self.num_seeds > 1]
        if not any(known):
            return None
        total = sum(v for v, k in zip(variances, known, strict=True) if k)
        if total == 0:
            return self.estimate, self.estimate
        parts = [v**2 / f for v, f, k in zip(variances, freedoms, known, strict=True) if k]
        width = float(stdtrit(total**2 / sum(parts), (1 + level) / 2)) * math.sqrt(total)
        return self.estimate - width, self.estimate + width


def combine(function: Callable[..., Array], *figures: Figure) -> Figure:
    """A figure that is computed from others.

    Args:
        function: Takes an array (K,) a figure, returns (K,); NaN where there is no value.
        figures: At least one.
    """

    def of(part: str) -> Array:
        return np.asarray(function(*(getattr(figure, part) for figure in figures)))

    estimate = function(*(np.array([figure.estimate]) for figure in figures))
    return Figure(
        float(np.asarray(estimate)[0]),
        of("rows"),
        of("seeds"),
        of("both"),
        # What does not depend on rows adds no noise of theirs. Of what is known of one seed the
        # noise of seeds is missing; that of the others is still better than none.
        num_rows=min((figure.num_rows for figure in figures if figure.num_rows > 1), default=1),
        num_seeds=min((figure.num_seeds for figure in figures if figure.num_seeds > 1), default=1),
    )


class Sampler:
    """Draws rows and seeds, the same ones for every figure of one item and set of seeds."""

    def __init__(self, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self._resamples, self._seed = resamples, seed
        self._drawn: dict[tuple[str, int], Array] = {}
        self._rows: dict[Axis, int] = {}
        self._unpaired = 0  # figures without rows so far

    def figure(
        self, reports: Sequence[EvaluationReport], seeds: Sequence[int], axis: Axis
    ) -> Figure:
        """The mean of an axis over the runs of several seeds.

        Args:
            reports: One a seed, measured on the same rows.
            seeds: S, all different.
            axis: Measured in all of them.

        Raises:
            ArtefactError: The runs have figures for different numbers of rows.
        """
        found = [axis.figure(report) for report in reports]
        means_S = np.array([math.nan if one is None else one.mean for one in found])
        by_row = [axis.by_row(report) for report in reports]
        lengths = {len(one[0]) for one in by_row if one is not None}
        if len(lengths) > 1:
            raise ArtefactError(
                f"{axis.name}: expected as many rows in every record, got "
                f"{' and '.join(map(str, sorted(lengths)))}; measure all runs on the same rows"
            )
        if not lengths or any(one is None for one in by_row):
            known = [one for one in found if one is not None]
            if len(known) < len(found):
                raise ArtefactError(f"{axis.name}: expected a figure of every run")
            drawn_SK = self._without_rows(known, axis)
            number = min(one.n for one in known)
            return self._over_seeds(means_S, drawn_SK, seeds, num_rows=number)
        rows = lengths.pop()
        if self._rows.setdefault(axis, rows) != rows:
            raise ArtefactError(
                f"{axis.name}: expected as many rows in every record, got {self._rows[axis]} and "
                f"{rows}; measure all runs on the same rows"
            )
        times_KN = self._times(axis.item, rows)
        drawn_SK = np.stack(
            [times_KN @ (w_N * v_N) / (times_KN @ w_N) for v_N, w_N in filter(None, by_row)]
        )
        return self._over_seeds(means_S, drawn_SK, seeds, num_rows=rows)

    def _without_rows(self, found: Sequence[Estimate], axis: Axis) -> Array:
        """Draws (S, K) of means by their own intervals, where the rows are not known.

        One row is hard for all seeds, so that these share their draws; other figures do not.
        """
        self._unpaired += 1
        generator = np.random.default_rng([self._seed, self._unpaired])
        normal_K = generator.standard_normal(self._resamples)
        return np.stack([_by_interval(one, normal_K, axis) for one in found])

    def constant(self, values: Sequence[float], seeds: Sequence[int]) -> Figure:
        """The mean over seeds of what does not depend on evaluation rows, such as F_Δ."""
        values_S = np.array(values, dtype=np.float64)
        drawn_SK = np.repeat(values_S[:, None], self._resamples, 1)
        return self._over_seeds(values_S, drawn_SK, seeds, num_rows=1)

    def _over_seeds(
        self, means_S: Array, drawn_SK: Array, seeds: Sequence[int], *, num_rows: int
    ) -> Figure:
        mean, rows_K = float(means_S.mean()), drawn_SK.mean(0)
        number = len(seeds)
        if number == 1:
            constant_K = np.full(self._resamples, mean)
            return Figure(mean, rows_K, constant_K, rows_K, num_rows, 1)
        spread = math.sqrt(number / (number - 1))
        shares_KS = self._times(f"seeds {sorted(seeds)}", number)[:, np.argsort(np.argsort(seeds))]
        shares_KS = shares_KS / number
        seeds_K = mean + spread * (shares_KS @ means_S - mean)
        both_K = rows_K + spread * ((shares_KS * drawn_SK.T).sum(1) - rows_K)
        return Figure(mean, rows_K, seeds_K, both_K, num_rows, number)

    def _times(self, what: str, number: int) -> Array:
        """How often each of `number` things is drawn: (K, number)."""
        key = (what, number)
        if key not in self._drawn:
            generator = np.random.default_rng([self._seed, zlib.crc32(what.encode()), number])
            drawn = generator.multinomial(number, np.full(number, 1 / number), self._resamples)
            self._drawn[key] = drawn.astype(np.float64)
        return self._drawn[key]


def _by_interval(one: Estimate, normal_K: Array, axis: Axis) -> Array:
    """As wide as the estimate's interval; a KL by its logarithm."""
    if axis.is_divergence and one.low > 0:
        width = math.log(one.high / one.low) / (2 * _NORMAL)
        return np.asarray(one.mean * np.exp(width * normal_K))
    return np.asarray(one.mean + (one.high - one.low) / (2 * _NORMAL) * normal_K)


def _variance(draws_K: Array) -> float:
    finite_K = draws_K[np.isfinite(draws_K)]
    if len(finite_K) < (1 - _MOST_MISSING) * len(draws_K):
        return math.nan
    return float(finite_K.var())
