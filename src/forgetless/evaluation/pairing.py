"""A metric's figures by row → base, tuned model and paired change; and two adapters on one set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgetless.evaluation.bootstrap import bootstrap_mean
from forgetless.evaluation.intervals import share_change, share_level
from forgetless.evaluation.results import Estimate, MetricResult, RowValues

_PER_TOKEN = frozenset({"nll", "kl", "board_loss"})
_ANY_SIZE = frozenset({"refusal_margin"})  # unlike a share, and signed
_NOT_NEGATIVE = (0.0, math.inf)


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
    *,
    wanted: bool = True,
) -> Measured:
    """One metric of base and tuned model.

    Args:
        metric: Its name.
        base: The base's figure of each row.
        tuned: The tuned model's.
        weights: Scored tokens of each row, for means per token.
        wanted: Whether more is better, for a share. More NLL never is.
    """
    if metric in _PER_TOKEN:
        result = MetricResult(
            metric=metric,
            base=bootstrap_mean(base, weights, bounds=_NOT_NEGATIVE, is_change=False),
            tuned=bootstrap_mean(tuned, weights, bounds=_NOT_NEGATIVE, is_change=False),
            change=bootstrap_mean(tuned - base, weights),
            higher_is_better=False,
        )
    elif metric in _ANY_SIZE:
        result = _means(metric, base, tuned, higher_is_better=wanted)
    else:
        result = MetricResult(
            metric=metric,
            base=share_level(base),
            tuned=share_level(tuned),
            change=share_change(base, tuned),
            higher_is_better=wanted,
        )
    by_row = RowValues(
        base=_kept(base), tuned=_kept(tuned), weights=() if weights is None else _kept(weights)
    )
    return Measured(result, by_row)


def paired_scores(
    metric: str,
    base: NDArray[np.float64],
    tuned: NDArray[np.float64],
    *,
    higher_is_better: bool,
) -> Measured:
    """A mean over rows of figures of any size; of shares where all lie between 0 and 1."""
    if _within_shares(base, tuned):
        return paired(metric, base, tuned, wanted=higher_is_better)
    result = _means(metric, base, tuned, higher_is_better=higher_is_better)
    return Measured(result, RowValues(base=_kept(base), tuned=_kept(tuned)))


def _means(
    metric: str,
    base: NDArray[np.float64],
    tuned: NDArray[np.float64],
    *,
    higher_is_better: bool,
) -> MetricResult:
    return MetricResult(
        metric=metric,
        base=bootstrap_mean(base, is_change=False),
        tuned=bootstrap_mean(tuned, is_change=False),
        change=bootstrap_mean(tuned - base),
        higher_is_better=higher_is_better,
    )


def _within_shares(*scores: NDArray[np.float64]) -> bool:
    return all(bool((score >= 0).all() and (score <= 1).all()) for score in scores)


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
        tuned=bootstrap_mean(kl, tokens, bounds=_NOT_NEGATIVE),
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
    if metric in _PER_TOKEN:
        return bootstrap_mean(a - b, np.array(ours.weights) if ours.weights else None)
    is_share = metric not in _ANY_SIZE and _within_shares(a, b)
    return share_change(b, a) if is_share else bootstrap_mean(a - b)
