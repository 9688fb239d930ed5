"""Bootstrap intervals: coverage on synthetic data, weights, pairing."""

from __future__ import annotations

import math

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


@pytest.mark.parametrize(
    ("rows", "normal", "skewed"),
    # The least coverage for normal and for log-normal rows. Percentiles of resampled means cover
    # 0.85, 0.92, 0.94, 0.945 and 0.75, 0.81, 0.86, 0.915.
    [(6, 0.935, 0.86), (12, 0.935, 0.885), (24, 0.935, 0.905), (80, 0.93, 0.93)],
)
def test_few_rows_are_covered_nearly_as_promised(rows, normal, skewed):
    generator = np.random.default_rng(rows)
    covered = np.zeros(2)
    for _ in range(700):
        for which, (values, truth) in enumerate(
            [
                (generator.normal(size=rows), 0.0),
                (generator.lognormal(size=rows), math.exp(0.5)),
            ]
        ):
            estimate = bootstrap_mean(values, resamples=500)
            covered[which] += estimate.low <= truth <= estimate.high
    assert normal <= covered[0] / 700 <= 0.985
    assert skewed <= covered[1] / 700 <= 0.985


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_fewer_than_six_rows_cannot_tell_a_change_from_none(rows):
    values = 1.0 + 0.001 * np.arange(rows)
    change = bootstrap_mean(values)
    assert change.low == 0.0 < change.mean < change.high
    assert bootstrap_mean(-values).high == 0.0


@pytest.mark.parametrize(
    ("rows", "quantile"),
    # Printed tables of Student's t, two-sided 5 %, by rows - 1.
    [(2, 12.706), (3, 4.303), (5, 2.776)],
)
def test_a_level_of_few_rows_has_students_interval_and_need_not_reach_zero(rows, quantile):
    values = 100.0 + np.arange(rows)
    half = quantile * values.std(ddof=1) / math.sqrt(rows)
    level = bootstrap_mean(values, is_change=False)
    assert (level.low, level.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), rel=1e-4
    )


def test_ends_are_those_of_a_plain_bootstrap_t_where_it_is_the_wider():
    values = np.random.default_rng(2).lognormal(size=40)
    weights = np.random.default_rng(3).integers(1, 9, size=40).astype(float)
    generator = np.random.default_rng(99)

    def mean_and_error(v, w):
        mean = sum(v * w) / sum(w)
        return mean, math.sqrt(sum((w * (v - mean)) ** 2)) / sum(w)

    mean, error = mean_and_error(values, weights)
    shifts = []
    for _ in range(20000):
        index = generator.integers(40, size=40)
        other, spread = mean_and_error(values[index], weights[index])
        shifts.append((other - mean) / spread)
    student = 2.0227 * math.sqrt(40 / 39) * error  # 39 degrees of freedom
    high = mean - sorted(shifts)[500] * error

    estimate = bootstrap_mean(values, weights, resamples=20000)

    assert estimate.mean == pytest.approx(mean)
    assert high > mean + student  # a long tail above: the mean may well be larger
    assert estimate.high == pytest.approx(high, abs=0.05 * (high - mean))
    assert estimate.low == pytest.approx(
        min(mean - student, mean - sorted(shifts)[19500] * error), abs=0.05 * student
    )


def test_bounds_end_the_interval():
    values = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert bootstrap_mean(values).low < 0
    assert bootstrap_mean(values, bounds=(0.0, 1.0)).low == 0
    assert bootstrap_mean(1 - values, bounds=(0.0, 1.0)).high == 1


def test_paired_change_is_far_narrower_than_the_rows_spread():
    generator = np.random.default_rng(4)
    base = generator.normal(scale=10, size=200)
    tuned = base + 0.1 + generator.normal(scale=0.01, size=200)

    change = bootstrap_mean(tuned - base)

    assert 0.09 < change.low < change.mean < change.high < 0.11
    assert bootstrap_mean(base).high - bootstrap_mean(base).low > 1


def test_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(5).lognormal(size=30)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1).high != bootstrap_mean(values, seed=2).high


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
