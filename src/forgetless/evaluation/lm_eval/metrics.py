"""Figures of lm-eval by row → base, tuned model and change paired by row, as for our own metrics.

A metric of lm-eval is a function of all rows. What kind it is shows in its value: a mean, a
perplexity or bits per byte (pairs of log-likelihood and length), or something else, such as a
correlation, for which rows are resampled in pairs and the function is called again.
"""

# Shape letters in this file: N = rows.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgetless.evaluation.bootstrap import FEWEST_ROWS, bootstrap_mean
from forgetless.evaluation.items import TASK_SHARES
from forgetless.evaluation.pairing import Measured, paired_scores
from forgetless.evaluation.results import Estimate, MetricResult, RowValues

_Pairs = tuple[NDArray[np.float64], NDArray[np.float64]]
_PairsOfBoth = tuple[_Pairs | None, _Pairs | None]
Aggregate = Callable[[list[Any]], Any]
_RESAMPLES = 200
_Z = 1.959963984540054
_NATS = math.log(2)  # in a bit
_LARGEST = 700.0  # e to more is infinite
_OURS = frozenset({"nll", "kl", "board_loss"})  # names that tables read as nats per token


def measured_metric(
    name: str,
    base: Sequence[Any],
    tuned: Sequence[Any],
    aggregate: Aggregate,
    *,
    higher_is_better: bool,
) -> Measured | None:
    """One metric of base and tuned model.

    Args:
        name: What it stands under.
        base: The base's figure of each row; None where a row has none.
        tuned: The tuned model's.
        aggregate: lm-eval's function from all rows to one value.
        higher_is_better: Whether more is better.

    Returns:
        None where it is not one number, or no row has figures of both.
    """
    rows = [(b, t) for b, t in zip(base, tuned, strict=True) if b is not None and t is not None]
    if not rows:
        return None
    before, after = [b for b, _ in rows], [t for _, t in rows]
    levels = _level(aggregate, before), _level(aggregate, after)
    if levels[0] is None or levels[1] is None:
        return None
    first, second = _scores(before), _scores(after)
    if first is not None and second is not None:
        if _is_mean(first, levels[0]) and _is_mean(second, levels[1]):
            return paired_scores(
                table_name(name, (first, second)), first, second, higher_is_better=higher_is_better
            )
        lengths = np.ones(len(rows))
        pairs: _PairsOfBoth = ((first, lengths), (second, lengths))
    else:
        pairs = (_pairs(before), _pairs(after))
    named = table_name(name, ())
    found = _perplexity(named, pairs, levels[0], levels[1], higher_is_better)
    return found or _resampled(
        named, before, after, aggregate, (levels[0], levels[1]), higher_is_better
    )


def table_name(name: str, scores: Sequence[NDArray[np.float64] | None]) -> str:
    """The name; another where tables would read it as nats a token or as a share, falsely."""
    share = name.partition(",")[0] in TASK_SHARES
    within = bool(scores) and all(x is not None and x.min() >= 0 and x.max() <= 1 for x in scores)
    return f"{name} score" if name in _OURS or (share and not within) else name


def _perplexity(
    name: str, pairs: _PairsOfBoth, base_level: float, tuned_level: float, higher_is_better: bool
) -> Measured | None:
    """exp(-Σ log-likelihood / Σ length), or that exponent in bits.

    The ratio's change is paired; e to it, times the base's value, is the perplexity's.
    """
    before, after = pairs
    if before is None or after is None or not np.array_equal(before[1], after[1]):
        return None
    length_N = before[1]
    before_N, after_N = -before[0] / length_N, -after[0] / length_N
    first, second = (float((x * length_N).sum() / length_N.sum()) for x in (before_N, after_N))
    bits = _near(first / _NATS, base_level) and _near(second / _NATS, tuned_level)
    if not bits and not (_near(_exp(first), base_level) and _near(_exp(second), tuned_level)):
        return None
    bounds = (0.0, math.inf)
    base, tuned = (
        bootstrap_mean(x, length_N, bounds=bounds, is_change=False) for x in (before_N, after_N)
    )
    change = bootstrap_mean(after_N - before_N, length_N)
    if bits:
        base, tuned, change = (_mapped(e, lambda x: x / _NATS) for e in (base, tuned, change))
    else:
        # With the base's level held: what the change is relative to.
        change = _mapped(change, lambda x: base_level * math.expm1(min(x, _LARGEST)))
        base, tuned = (_mapped(e, _exp) for e in (base, tuned))
    result = MetricResult(
        metric=name, base=base, tuned=tuned, change=change, higher_is_better=higher_is_better
    )
    # By row and length these are log-likelihoods, not the metric: nothing that another run pairs.
    return Measured(result, RowValues(tuned=()))


def _resampled(
    name: str,
    before: list[Any],
    after: list[Any],
    aggregate: Aggregate,
    all_rows: tuple[float, float],
    higher_is_better: bool,
) -> Measured:
    """Base and tuned model on the same resampled rows; ±1.96 of the spread that comes."""
    rows = len(before)
    generator = np.random.default_rng(0)
    levels: list[tuple[float, float]] = []
    for _ in range(_RESAMPLES if rows > 1 else 0):
        index_N = generator.integers(rows, size=rows)
        b = _level(aggregate, [before[i] for i in index_N])
        t = _level(aggregate, [after[i] for i in index_N])
        if b is not None and t is not None:
            levels.append((b, t))
    base, tuned = all_rows
    spread = np.array(levels or [(0.0, 0.0)])

    def estimate(mean: float, values: NDArray[np.float64], is_change: bool) -> Estimate:
        half = _Z * float(values.std())
        low, high = mean - half, mean + half
        if is_change and rows < FEWEST_ROWS:
            low, high = min(low, 0.0), max(high, 0.0)
        return Estimate(mean=mean, low=low, high=high, n=rows)

    result = MetricResult(
        metric=name,
        base=estimate(base, spread[:, 0], False),
        tuned=estimate(tuned, spread[:, 1], False),
        change=estimate(tuned - base, spread[:, 1] - spread[:, 0], True),
        higher_is_better=higher_is_better,
    )
    return Measured(result, RowValues(tuned=()))


def _level(aggregate: Aggregate, rows: list[Any]) -> float | None:
    """The function of all rows; None where it fails, as it is a task's own and may do anything."""
    try:
        return _number(aggregate(list(rows)))
    except (
        *(ArithmeticError, AttributeError, ImportError, LookupError),
        *(OSError, RuntimeError, TypeError, ValueError),
    ):
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float | np.number) and math.isfinite(float(value)):
        return float(value)
    return None


def _scores(values: Sequence[Any]) -> NDArray[np.float64] | None:
    if not all(isinstance(value, float) for value in values):
        return None
    found = np.array(values, np.float64)
    return found if np.isfinite(found).all() else None


def _pairs(values: Sequence[Any]) -> _Pairs | None:
    """Log-likelihoods and lengths, where rows are such pairs."""
    if not all(
        isinstance(v, list) and len(v) == 2 and all(isinstance(x, int | float) for x in v)
        for v in values
    ):
        return None
    found = np.array(values, np.float64)
    if not np.isfinite(found).all() or (found[:, 1] <= 0).any():
        return None
    return found[:, 0], found[:, 1]


def _is_mean(scores: NDArray[np.float64], level: float) -> bool:
    return math.isclose(float(scores.mean()), level, rel_tol=1e-9, abs_tol=1e-12)


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, _LARGEST))


def _near(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=1e-6)


def _mapped(estimate: Estimate, change: Callable[[float], float]) -> Estimate:
    """The same through a rising function."""
    mean, low, high = (change(x) for x in (estimate.mean, estimate.low, estimate.high))
    return Estimate(mean=mean, low=low, high=high, n=estimate.n)
