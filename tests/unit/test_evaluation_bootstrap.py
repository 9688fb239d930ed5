"""Bootstrap intervals: coverage on synthetic data, weights, pairing."""

from __future__ import annotations

import numpy as np
import pytest

from forgetless.evaluation.bootstrap import bootstrap_mean


def test_interval_of_a_mean_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        estimate = bootstrap_mean(generator.exponential(2.0, size=80), resamples=400)
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98


def test_interval_of_a_token_weighted_mean_covers_the_truth():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        tokens = generator.integers(1, 50, size=80).astype(float)
        # Long rows are easier: the mean per token is not the mean over rows.
        rows = 3.0 - tokens / 50 + generator.normal(size=80)
        truth = 3.0 - np.mean(np.arange(1, 50) ** 2) / np.mean(np.arange(1, 50)) / 50
        estimate = bootstrap_mean(rows, tokens, resamples=400)
        covered += estimate.low <= truth <= estimate.high
    assert 0.89 <= covered / 300 <= 0.98


def test_ends_are_the_percentiles_of_a_plain_loop():
    values = np.random.default_rng(2).normal(size=40) ** 3
    weights = np.random.default_rng(3).integers(1, 9, size=40).astype(float)
    generator = np.random.default_rng(99)
    means = []
    for _ in range(20000):
        index = generator.integers(40, size=40)
        means.append(sum(values[index] * weights[index]) / sum(weights[index]))
    low, high = sorted(means)[500], sorted(means)[19500]

    estimate = bootstrap_mean(values, weights, resamples=20000)

    spread = high - low
    assert estimate.mean == pytest.approx((values * weights).sum() / weights.sum())
    assert estimate.low == pytest.approx(low, abs=0.03 * spread)
    assert estimate.high == pytest.approx(high, abs=0.03 * spread)


def test_paired_change_is_far_narrower_than_the_rows_spread():
    generator = np.random.default_rng(4)
    base = generator.normal(scale=10, size=200)
    tuned = base + 0.1 + generator.normal(scale=0.01, size=200)

    change = bootstrap_mean(tuned - base)

    assert 0.09 < change.low < change.mean < change.high < 0.11
    assert bootstrap_mean(base).high - bootstrap_mean(base).low > 1


def test_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(5).normal(size=30)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1).low != bootstrap_mean(values, seed=2).low


def test_one_row_has_an_interval_of_its_mean():
    estimate = bootstrap_mean(np.array([2.5]), np.array([7.0]))
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (2.5, 2.5, 2.5, 1)


def test_equal_rows_have_an_interval_of_their_value():
    estimate = bootstrap_mean(np.full(50, 0.1), np.arange(1.0, 51.0))
    assert estimate.low == pytest.approx(0.1)
    assert estimate.low <= estimate.mean <= estimate.high


def test_many_rows_are_resampled_in_blocks_without_a_seam():
    values = np.random.default_rng(6).normal(size=30_000)
    estimate = bootstrap_mean(values, resamples=200)
    standard_error = values.std() / np.sqrt(len(values))
    assert estimate.high - estimate.low == pytest.approx(3.92 * standard_error, rel=0.25)
