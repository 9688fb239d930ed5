"""Intervals of shares: published values, coverage near 1, agreement with the exact test."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from forgetless.evaluation.intervals import (
    clopper_pearson,
    paired_change,
    share_change,
    share_level,
    wilson,
)


@pytest.mark.parametrize(
    ("count", "rows", "by_score", "exact"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 857-872, Table I.
        (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
        (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
        (0, 20, (0.0, 0.1611), (0.0, 0.1684)),
        (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
    ],
)
def test_intervals_of_a_share_are_the_published_ones(count, rows, by_score, exact):
    assert wilson(count, rows) == pytest.approx(by_score, abs=6e-5)
    assert clopper_pearson(count, rows) == pytest.approx(exact, abs=6e-5)


def test_shares_of_none_and_of_all_have_a_width():
    none, every = share_level(np.zeros(100)), share_level(np.ones(100))
    assert (none.mean, none.low, every.mean, every.high) == (0.0, 0.0, 1.0, 1.0)
    assert none.high == pytest.approx(0.037, abs=1e-3)
    assert every.low == pytest.approx(0.963, abs=1e-3)


def test_level_interval_covers_a_share_near_one():
    n, p = 200, 0.98
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson(k, n)[0] <= p <= wilson(k, n)[1]
    )
    assert covered >= 0.93


def exact_mcnemar(gained: int, lost: int) -> float:
    m, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(m, i) for i in range(k + 1)) / 2**m)


@pytest.mark.parametrize("rows", [40, 200])
def test_change_is_significant_only_where_the_exact_test_is(rows):
    for gained in range(12):
        for lost in range(12):
            low, high = paired_change(gained, lost, rows)
            assert low < (gained - lost) / rows < high
            if exact_mcnemar(gained, lost) > 0.05:
                assert low <= 0 <= high, (gained, lost)
    assert paired_change(0, 4, 200)[1] > 0
    assert paired_change(0, 8, 200)[1] < 0


def test_change_covers_the_truth_with_hardly_any_discordant_rows():
    interval = functools.cache(paired_change)
    generator = np.random.default_rng(0)
    for up, down in ((0.0, 0.01), (0.005, 0.005), (0.0, 0.02), (0.002, 0.01)):
        draws = generator.multinomial(200, [up, down, 1 - up - down], size=1500)
        inside = [
            low <= up - down <= high
            for low, high in (interval(int(g), int(x), 200) for g, x, _ in draws)
        ]
        assert np.mean(inside) >= 0.94


def test_no_discordant_row_gives_tangos_closed_form():
    z = 1.959964
    end = z**2 / (100 + z**2)
    assert paired_change(0, 0, 100) == pytest.approx((-end, end), abs=1e-6)
    same = np.repeat([0.0, 1.0], 50)
    assert share_change(same, same).high == pytest.approx(end, abs=1e-6)


def test_scores_between_zero_and_one_need_six_rows_that_differ():
    before = np.full(100, 0.5)
    five, many = before.copy(), before.copy()
    five[:5], many[:20] = 0.1, 0.1
    assert share_change(before, five).high > 0
    assert share_change(before, many).high < 0
