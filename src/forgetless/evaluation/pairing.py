"""A metric's figures by row → base, tuned model and paired change; and two adapters on one set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgetless.evaluation.bootstrap import bootstrap_mean
from forgetless.evaluation.intervals import share_change, share_level
from forgetless.evaluation.results import Estimate, MetricResult, RowValues

_LOWER_IS_BETTER = frozenset({"nll", "kl"})


@dataclass(frozen=True)
class Measured:
    """A metric's estimates, and the figures by row behind them."""

    result: MetricResult
    by_row: RowValues


def paired(
    metric: str,
    base: NDArray[np.float64],
    tuned: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
) -> Measured:
    """One metric of base and tuned model; `weights` are scored tokens, for means per token."""
    shares = metric not in _LOWER_IS_BETTER
    result = MetricResult(
        metric=metric,
        base=share_level(base) if shares else bootstrap_mean(base, weights),
        tuned=share_level(tuned) if shares else bootstrap_mean(tuned, weights),
        change=share_change(base, tuned) if shares else bootstrap_mean(tuned - base, weights),
        higher_is_better=shares,
    )
    by_row = RowValues(
        base=_kept(base), tuned=_kept(tuned), weights=() if weights is None else _kept(weights)
    )
    return Measured(result, by_row)


def _kept(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Figures for the record: six digits tell more than the rounding of a forward pass leaves."""
    return tuple(float(f"{value:.6g}") for value in values)


def divergence(
    kl: NDArray[np.float64],
    tokens: NDArray[np.float64],
) -> Measured:
    """KL of each row per token: a comparison itself, without a base and a change."""
    result = MetricResult(
        metric="kl",
        base=None,
        tuned=bootstrap_mean(kl, tokens),
        change=None,
        higher_is_better=False,
    )
    return Measured(result, RowValues(tuned=_kept(kl), weights=_kept(tokens)))


def difference(metric: str, ours: RowValues, theirs: RowValues) -> Estimate | None:
    """Mean of one adapter's figures minus another's, paired by row.

    Returns:
        None where the two were not measured on the same rows and tokens.
    """
    if len(ours.tuned) != len(theirs.tuned) or ours.weights != theirs.weights or not ours.tuned:
        return None
    a, b = np.array(ours.tuned), np.array(theirs.tuned)
    if metric in _LOWER_IS_BETTER:
        return bootstrap_mean(a - b, np.array(ours.weights) if ours.weights else None)
    return share_change(b, a)
