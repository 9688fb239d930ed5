"""Front, hypervolume, interpolation and intervals against independent references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compare_records import World
from forgetless.errors import ArtefactError
from forgetless.experiments.compare import compare
from forgetless.experiments.compare.arms import arms_of
from forgetless.experiments.compare.axes import Axis
from forgetless.experiments.compare.figures import Figures, interval_of
from forgetless.experiments.compare.front import hypervolume, on_front
from forgetless.experiments.compare.law import explained, line
from forgetless.experiments.compare.matching import envelope, loss_at
from forgetless.experiments.compare.sampling import Sampler, combine

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8)


def columns(points):
    gains, losses = (np.array([[p[i]] for p in points], dtype=float) for i in (0, 1))
    return gains, losses


@given(POINTS)
def test_the_front_is_what_no_other_point_dominates(points):
    def dominated(a):
        return any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in points)

    expected = [not dominated(point) for point in points]
    assert on_front(*columns(points))[:, 0].tolist() == expected


@given(POINTS)
def test_the_hypervolume_is_the_area_of_the_cells_that_a_point_dominates(points):
    cells = [(x, y) for x in range(6) for y in range(6)]  # unit cells of a 6 × 6 rectangle
    covered = sum(any(gain > y and loss <= x for gain, loss in points) for x, y in cells)
    assert hypervolume(*columns(points), 6.0, 6.0)[0] == pytest.approx(covered / 36)


def test_points_that_are_not_known_are_on_no_front():
    gains = np.array([[1.0], [np.nan], [0.5]])
    losses = np.array([[1.0], [0.0], [0.5]])
    assert on_front(gains, losses)[:, 0].tolist() == [True, False, True]


def test_a_loss_is_interpolated_by_its_root_where_it_is_a_kl():
    scales = np.array([0.5, 1.0])[:, None]
    # Gain linear in the scale, KL in its square: exact between the points.
    found = loss_at(scales, scales**2, np.array([0.25, 0.75, 1.0]), is_divergence=True)
    np.testing.assert_allclose(found, [0.0625, 0.5625, 1.0])
    straight = loss_at(scales, scales, np.array([0.25, 0.75]), is_divergence=False)
    np.testing.assert_allclose(straight, [0.25, 0.75])
    falling = loss_at(scales, -scales, np.array([0.25]), is_divergence=False)
    np.testing.assert_allclose(falling, [-0.25])  # what became better stays so


def test_a_gain_that_is_not_reached_has_no_cost_and_the_first_crossing_counts():
    gains = np.array([[0.5], [1.0], [0.6], [0.9]])
    losses = np.array([[0.1], [0.4], [2.0], [4.0]])
    target = np.array([0.7, 1.1, 0.0, -1.0])
    found = loss_at(np.repeat(gains, 4, 1), np.repeat(losses, 4, 1), target, is_divergence=False)
    np.testing.assert_allclose(found, [0.22, np.nan, np.nan, np.nan])
    cheaper = (np.repeat([[0.8]], 4, 1), np.repeat([[0.08]], 4, 1))
    least = envelope(
        [(np.repeat(gains, 4, 1), np.repeat(losses, 4, 1)), cheaper], target, is_divergence=False
    )
    np.testing.assert_allclose(least[0], 0.07)
    assert np.isnan(least[1:]).all()


def test_the_line_is_that_of_numpy():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 12))
    slope, intercept = np.polyfit(x, y, 1)
    found = line(x[:, None], y[:, None])
    np.testing.assert_allclose([found[0][0], found[1][0]], [intercept, slope])
    r = np.corrcoef(x, y)[0, 1]
    np.testing.assert_allclose(explained(x, y)[:2], [slope, r**2])


@pytest.mark.parametrize(("seed_noise", "row_noise"), [(0.3, 0.1), (0.02, 1.0), (0.2, 1.0)])
def test_intervals_hold_what_they_promise_with_three_seeds(seed_noise, row_noise):
    """Worlds with other seeds and other rows: the true mean lies inside in 95 % of them."""
    axis, inside, worlds = Axis("retention", "facts", "kl"), 0, 150
    for draw in range(worlds):
        world = World(draw=draw, own_noise=seed_noise, row_noise=row_noise, rows=60)
        records = world.records({"lora": {}}, rates=(1e-3,))
        cell = arms_of(records)[0].cells[0]
        figure = Figures(Sampler(200, seed=draw)).of(cell, axis)
        found = interval_of(figure, cell, axis)
        inside += found.low <= 0.3**2 * np.exp(seed_noise**2 / 2) <= found.high
    assert 0.91 * worlds <= inside <= 0.99 * worlds


def test_what_two_figures_share_cancels_in_their_difference():
    world = World(own_noise=0.0, seed_noise=0.5)
    sampler, axis = Sampler(200), Axis("retention", "facts", "kl")
    figures = [
        sampler.figure([r.evaluation for r in found], [r.seed for r in found], axis)
        for found in (
            world.records({name: {"factor": factor}}, rates=(1e-3,))
            for name, factor in (("a", 1.0), ("b", 2.0))
        )
    ]
    ratio = combine(lambda a, b: b / a, *figures)
    low, high = ratio.interval()
    assert (low, high) == pytest.approx((2, 2), rel=1e-3)
    assert figures[0].interval()[1] - figures[0].interval()[0] > 0.5 * figures[0].estimate


def test_with_one_seed_only_rows_are_drawn_and_where_they_are_not_known_as_wide_as_the_mean():
    world, axis = World(), Axis("retention", "facts", "kl")
    record = world.records({"lora": {}}, rates=(1e-3,), seeds=(0,))[0]
    figure = Sampler(200).figure([record.evaluation], [0], axis)
    own = record.evaluation.items[1].metrics["kl"].tuned
    assert figure.interval() == pytest.approx((own.low, own.high), rel=0.15)
    bare = record.evaluation.model_copy(
        update={
            "items": tuple(i.model_copy(update={"row_values": {}}) for i in record.evaluation.items)
        }
    )
    for reports in ([bare], [bare, bare]):
        found = Sampler(1000).figure(reports, range(len(reports)), axis).interval()
        assert found == pytest.approx((own.low, own.high), rel=0.15)
    single = bare.model_copy(update={"items": tuple(map(_of_one_row, bare.items))})
    assert Sampler(200).figure([single], [0], axis).interval() is None


def _of_one_row(item):
    metrics = {
        name: one.model_copy(
            update={
                "tuned": one.tuned.model_copy(
                    update={"n": 1, "low": one.tuned.mean, "high": one.tuned.mean}
                )
            }
        )
        for name, one in item.metrics.items()
    }
    return item.model_copy(update={"metrics": metrics})


def test_records_without_figures_by_row_decide_nothing_between_equals():
    # As of groups of lm-eval tasks: 50 rows, right or wrong, and as many of either.
    decided = 0
    for draw in range(20):
        world = World(draw=draw, own_noise=0.4)
        arms = {"lora": {"scaled": True}, "milora": {"method": "milora"}}
        records = [
            one.model_copy(
                update={
                    "evaluation": _without_rows(one.evaluation),
                    "scaled": [_without_rows(report) for report in one.scaled],
                }
            )
            for one in world.records(arms, rates=(1e-3,), seeds=(0,))
        ]
        found = {arm.name: arm for arm in compare(records, resamples=200).arms}
        decided += found["milora"].matched[0].outcome != "unclear"
    assert decided <= 3


def _without_rows(report):
    """KL with an interval of a factor of three either way."""
    kept = report.items[1]
    kl = kept.metrics["kl"]
    wide = kl.tuned.model_copy(update={"low": kl.tuned.mean / 3, "high": kl.tuned.mean * 3})
    kept = kept.model_copy(
        update={"row_values": {}, "metrics": {"kl": kl.model_copy(update={"tuned": wide})}}
    )
    return report.model_copy(update={"items": (report.items[0], kept)})


def test_other_numbers_of_rows_are_refused():
    axis, sampler = Axis("retention", "facts", "kl"), Sampler(50)
    few, many = (World(rows=n).records({"lora": {}}, rates=(1e-3,))[0] for n in (50, 60))
    sampler.figure([few.evaluation], [0], axis)
    with pytest.raises(ArtefactError, match="expected as many rows in every record, got 50 and 60"):
        sampler.figure([many.evaluation], [0], axis)
