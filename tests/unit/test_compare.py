"""A comparison finds what was planted in the records, and says no more than they show."""

from __future__ import annotations

import numpy as np
import pytest

from compare_records import RATES, World
from forgetless.errors import ArtefactError
from forgetless.evaluation.pairing import paired
from forgetless.experiments.compare import Comparison, compare
from forgetless.experiments.compare.arms import arms_of

LORA = {"lora": {"scaled": True}}
DECAYED = {"decayed": {"recipe": {"weight_decay": 0.1}, "size": 0.9, "gain": 0.95}}
FEW = 300  # resamples


def by_name(comparison: Comparison):
    return {arm.name: arm for arm in comparison.arms}


def matched(comparison: Comparison, name: str):
    return by_name(comparison)[name].matched[0]


def front(comparison: Comparison, name: str):
    return by_name(comparison)[name].fronts[0]


def test_a_method_that_keeps_more_at_the_same_gain_wins():
    good = {"lora-null": {"method": "lora-null", "factor": 0.1, "size": 0.8, "gain": 1.02}}
    found = compare(World().records(LORA | DECAYED | good), resamples=FEW)
    assert found.title == "lora-null kept more than plain LoRA at the same gain"
    one = matched(found, "lora-null")
    assert one.outcome == "kept more"
    assert one.best.high < 0.5
    assert front(found, "lora-null").probability == 1
    assert front(found, "lora").probability < 1


def test_a_dominated_method_is_never_on_the_front_and_plain_lora_wins():
    bad = {"pissa": {"method": "pissa", "factor": 4.0, "gain": 0.9}}
    found = compare(World().records(LORA | bad), resamples=FEW)
    assert found.title == "Plain LoRA wins: no method kept more at the same gain, and pissa less"
    assert matched(found, "pissa").outcome == "lost more"
    assert front(found, "pissa").probability == 0
    assert not front(found, "pissa").is_on_front
    assert front(found, "pissa").alone == 0
    assert front(found, "lora").probability == 1


def test_a_tie_is_within_noise():
    world = World(own_noise=0.2)
    same = {"milora": {"method": "milora"}}
    found = compare(world.records(LORA | same), resamples=FEW)
    assert matched(found, "milora").outcome == "unclear"
    assert matched(found, "milora").best.low < 1 < matched(found, "milora").best.high
    assert found.title == "No method can be told from plain LoRA at the same gain"
    assert "cannot be told apart: milora" in found.words[0]


def test_a_method_that_is_plain_lora_turned_down_is_no_better():
    """ΔW × 0.5 of the law's square: three quarters of the gain for a quarter of the KL."""
    world = World(own_noise=0.0)
    half = {"mica": {"method": "mica", "factor": 0.25, "gain": 0.75}}
    found = compare(world.records(LORA | half, rates=(1e-3,)), resamples=FEW)
    one = matched(found, "mica")
    assert one.scaled.value == pytest.approx(1, rel=0.02)
    assert one.best.value >= one.scaled.value * 0.999
    assert one.outcome != "kept more"


def test_more_gain_than_lora_ever_has_is_said_and_held_against_its_largest_gain():
    more = {"eva": {"method": "eva", "gain": 1.3}}
    found = compare(World(own_noise=0.01).records(LORA | more), resamples=FEW)
    one = matched(found, "eva")
    assert one.beyond
    assert one.best.value == pytest.approx(1, rel=0.1)
    assert "gaining more than LoRA ever does" in found.words[0]


def test_a_planted_law_is_found_and_who_beats_it():
    arms = {
        "lora": {"scaled": True},
        "pissa": {"method": "pissa", "size": 1.5},
        "milora": {"method": "milora", "size": 0.7},
        "lora-null": {"method": "lora-null", "factor": 0.05, "size": 1.2},
    }
    found = compare(World(slope=1.7).records(arms), resamples=FEW)
    factors = {name: arm.residuals[0] for name, arm in by_name(found).items()}
    # Without lora-null the others' line is the planted law: 0.05 of it.
    assert factors["lora-null"].factor.value == pytest.approx(0.05, rel=0.15)
    assert factors["lora-null"].beats
    assert not any(factors[name].beats for name in ("lora", "pissa", "milora"))
    alone = compare(World(slope=1.7).records({k: arms[k] for k in arms if k != "lora-null"}))
    assert alone.laws[0].slope == pytest.approx(1.7, abs=0.05)
    assert alone.laws[0].r_squared > 0.99
    assert "no method beats it" in " ".join(alone.words)


def test_the_rate_is_chosen_on_validation_rows_and_never_on_evaluation_rows():
    world = World()
    records = world.records(LORA, seeds=(0,))
    assert arms_of(records)[0].chosen().rate == 1e-3  # which gains most
    turned = [
        r.model_copy(
            update={
                "training": r.training.model_copy(
                    update={"validation_nll": r.training.learning_rate}
                )
            }
        )
        for r in records
    ]
    assert arms_of(turned)[0].chosen().rate == RATES[0]


def test_rates_are_compared_on_the_seeds_that_all_of_them_have():
    world = World()
    records = world.records(LORA, seeds=(0,))
    more = world.records(LORA, rates=(2e-3,), seeds=(1, 2))
    lucky = [
        r.model_copy(update={"training": r.training.model_copy(update={"validation_nll": 0.0})})
        for r in more
    ]
    arm = arms_of([*records, *lucky])[0]
    assert arm.chosen().rate == 1e-3


def test_without_validation_rows_nothing_is_chosen_and_it_is_said():
    records = World(validated=False).records(LORA | {"pissa": {"method": "pissa"}})
    found = compare(records, resamples=FEW)
    assert all(arm.chosen_rate is None and not arm.matched for arm in found.arms)
    assert any("(training.validation_rows)" in note for note in found.notes)
    assert len(found.points) == 4 * 4 + 4  # every rate; plain LoRA also at three scales


def test_one_seed_is_called_one_seed():
    good = {"lora-null": {"method": "lora-null", "factor": 0.1}}
    one = compare(World().records(LORA | good, seeds=(0,)), resamples=FEW)
    assert any(note.startswith("One seed: ") for note in one.notes)
    assert by_name(one)["lora-null"].seeds == (0,)
    some = World().records(LORA) + World().records(good, seeds=(0,))
    mixed = compare(some, resamples=FEW)
    assert any("3 seeds for lora; 1 seed for lora-null" in note for note in mixed.notes)


def test_what_all_methods_of_a_seed_share_cancels_where_they_are_paired():
    good = {"lora-null": {"method": "lora-null", "factor": 0.5}}
    world = World(seed_noise=1.0, own_noise=0.02)
    paired = matched(compare(world.records(LORA | good), resamples=FEW), "lora-null").best
    unpaired = World(seed_noise=0.0, own_noise=1.0)
    loose = matched(compare(unpaired.records(LORA | good), resamples=FEW), "lora-null").best
    assert paired.high / paired.low < 1.3
    assert loose.high / loose.low > 3


def test_safe_rates_are_those_beside_the_best_that_gain_most_of_it_and_lose_no_more_than_lora():
    good = {"lora-null": {"method": "lora-null", "factor": 0.1}}
    found = compare(World(own_noise=0.0).records(LORA | good), resamples=FEW)
    band = by_name(found)["lora-null"].band
    # 5e-4 and 2e-3 gain 1 - 0.3 log10(2)², 2e-4 gains 0.85; at 2e-3 a tenth of four times LoRA's.
    assert (band.low, band.high) == (5e-4, 2e-3)
    lora = by_name(found)["lora"].band
    assert (lora.low, lora.high) == (5e-4, 1e-3)  # at 2e-3 it loses more than at its own


def test_arms_differ_in_all_but_rate_and_seed():
    world = World()
    arms = {
        "a": {},
        "b": {"method": "lora-wd"},
        "c": {"recipe": {"weight_decay": 0.3}},
        "d": {"recipe": {"regularisers": [{"name": "kl", "weight": 2.0, "batch_size": 4}]}},
        "e": {"method": "sc-lora", "options": {"beta": 0.5}},
        "f": {"options": {"rank": 8}},
    }
    records = [world.one(key, 1e-3, 0, **options) for key, options in arms.items() if key != "c"]
    names = [arm.name for arm in arms_of(records)]
    assert names == [
        "lora (rank 32)",
        "lora (rank 8)",
        "lora wd 0.3",
        "lora + kl weight 2.0",
        "sc-lora beta 0.5",
    ]
    decayed = [world.one(key, 1e-3, seed, **arms[key]) for seed, key in enumerate("bc")]
    assert len(arms_of(decayed)) == 1  # two ways to say the same
    assert len(arms_of([records[0], records[0]])[0].cells[0].records) == 1
    other = World(draw=1).one("a", 1e-3, 0)
    with pytest.raises(
        ArtefactError, match=r"one record of lora at rate 0\.001 with seed 0, got two whose figures"
    ):
        arms_of([records[0], other])
    saved = [world.one("a", 1e-3, s, recipe={"save_steps": 50 * (s + 1)}) for s in (0, 1)]
    assert len(arms_of(saved)) == 1  # what changes no adapter makes no other arm


def test_arms_that_differ_in_their_preserve_data_are_named_by_it():
    world = World()
    records = []
    for sources in (
        [{"path": "qa.jsonl"}],
        [{"self": True}],
        [{"path": "qa.jsonl"}, {"self": True}],
    ):
        one = world.one("x", 1e-3, 0, method="lora-null")
        records.append(one.model_copy(update={"recipe": {**one.recipe, "preserve_data": sources}}))
    names = [arm.name for arm in arms_of(records)]
    assert names == [
        "lora-null (preserve: qa)",
        "lora-null (preserve: self)",
        "lora-null (preserve: qa and self)",
    ]


def test_no_two_arms_share_a_name():
    world = World()
    good = {"method": "lora-null"}
    sources = [
        {"path": "a/qa.jsonl", "limit": 64},
        {"path": "a/qa.jsonl", "limit": 512},
        {"path": "b/qa.jsonl", "limit": 64},
    ]
    records = world.records(LORA)
    for place, source in enumerate(sources):
        records += [
            one.model_copy(update={"recipe": {**one.recipe, "preserve_data": [source]}})
            for one in world.records({f"x{place}": {**good, "factor": 0.1 * 10**place}})
        ]
    found = compare(records, resamples=FEW)
    factors = [arm.matched[0].best.value for arm in found.arms if not arm.is_lora]
    assert len({arm.name for arm in found.arms}) == 4
    np.testing.assert_allclose(factors, [0.1, 1, 10], rtol=0.2)
    assert "limit 512" in found.arms[2].name


def title(*arms: dict, gain: float = 1.0, **world) -> str:
    records = World(**world).records({"lora": {"scaled": True, "gain": gain}})
    records += World(**world).records({one["method"]: one for one in arms})
    return compare(records, resamples=FEW).title


def test_titles_leave_no_method_out_and_say_nothing_that_is_not_so():
    more = {"method": "eva", "gain": 1.6, "factor": 1.3}
    assert title(more) == "eva gained more than LoRA ever did, and did not keep more"
    assert title({"method": "eva", "gain": -1.0}) == "eva gained nothing"
    assert "gained more than LoRA ever did" in title({"method": "eva", "factor": 0.3}, gain=-0.01)
    good, bad = {"method": "eva", "factor": 0.1}, {"method": "pissa", "factor": 4.0, "gain": 0.9}
    assert title(good, bad) == (
        "eva kept more than plain LoRA at the same gain; plain LoRA kept more than pissa"
    )


def test_what_keeps_more_on_one_set_and_less_on_another_is_said():
    world = World()

    def both(records, factor):
        """A second set to be kept, of which `factor` times as much is lost."""
        return [
            one.model_copy(
                update={
                    "evaluation": _with_further(one.evaluation, factor),
                    "scaled": [_with_further(report, factor) for report in one.scaled],
                }
            )
            for one in records
        ]

    records = both(world.records(LORA), 1.0)
    records += both(world.records({"milora": {"method": "milora", "factor": 0.1}}), 100.0)
    found = compare(records, resamples=FEW)
    assert found.title == "milora kept more on some sets and less on others"


def _with_further(report, factor):
    kept = report.items[1]
    kl = kept.row_values["kl"]
    further = kept.model_copy(
        update={
            "name": "further",
            "metrics": {
                "kl": kept.metrics["kl"].model_copy(
                    update={"tuned": _times(kept.metrics["kl"].tuned, factor)}
                )
            },
            "row_values": {
                "kl": kl.model_copy(update={"tuned": tuple(factor * v for v in kl.tuned)})
            },
        }
    )
    return report.model_copy(update={"items": (*report.items, further)})


def _times(one, factor):
    return one.model_copy(
        update={"mean": factor * one.mean, "low": factor * one.low, "high": factor * one.high}
    )


def test_one_seed_stands_in_the_title():
    good = {"lora-null": {"method": "lora-null", "factor": 0.1}}
    assert compare(World().records(LORA | good, seeds=(0,)), resamples=FEW).title == (
        "lora-null kept more than plain LoRA at the same gain, by one seed"
    )
    mixed = World().records(LORA) + World().records(good, seeds=(0,))
    assert compare(mixed, resamples=FEW).title == (
        "lora-null (one seed) kept more than plain LoRA at the same gain"
    )


def test_which_plain_lora_stands_for_all_does_not_hang_on_the_order():
    world = World()
    arms = {
        "small": {"options": {"rank": 8}, "gain": 0.8, "scaled": True},
        "large": {"scaled": True},
        "pissa": {"method": "pissa"},
    }
    found = [
        compare(world.records({name: arms[name] for name in order}), resamples=FEW)
        for order in (("small", "large", "pissa"), ("large", "small", "pissa"))
    ]
    assert by_name(found[0])["pissa"].band == by_name(found[1])["pissa"].band
    for one in found:
        assert any("lora (rank 32) stands for them" in note for note in one.notes)


def test_what_a_run_lacks_is_left_out_aloud():
    records = World().records(LORA | {"eva": {"method": "eva"}}, seeds=(0,))
    report = records[0].evaluation.model_copy(update={"items": records[0].evaluation.items[:1]})
    records[0] = records[0].model_copy(update={"evaluation": report})
    found = compare(records, resamples=FEW)
    assert any("Left out: KL on facts; 1 run has no figure of it" in note for note in found.notes)
    assert all(arm.band is None for arm in found.arms)


def test_a_law_is_not_beaten_where_no_other_arm_has_updates_of_that_size():
    # One curve for all, bent where the third arm lies: only a line through the others shows a gap.
    arms = {
        name: {"method": method, "size": size, "factor": factor}
        for name, method, size, factor in (
            ("lora", "lora", 10.0, 1.0),
            ("pissa", "pissa", 14.0, 1.0),
            ("mica", "mica", 0.15, 0.02),
        )
    }
    arms["lora"]["scaled"] = True
    found = by_name(compare(World(own_noise=0.02).records(arms), resamples=FEW))["mica"]
    assert found.residuals[0].factor.high < 0.1
    assert not found.residuals[0].beats


def test_no_records_are_no_comparison():
    assert compare([]).title == "No runs to compare"


def test_figures_survive_json():
    found = compare(World().records(LORA | DECAYED, seeds=(0,)), resamples=FEW)
    assert Comparison.model_validate_json(found.model_dump_json()) == found


def test_runs_that_cannot_be_compared_and_quick_ones_claim_nothing():
    records = World().records(LORA, seeds=(0,))
    other = records[0].model.model_copy(update={"fingerprint": "other"})
    found = compare([records[0], records[1].model_copy(update={"model": other})])
    assert "cannot be compared" in found.title
    assert not found.arms
    quick = records[0].model_copy(update={"recipe": {**records[0].recipe, "claims": False}})
    assert compare([quick, records[1]]).title == "Quick runs: nothing is claimed"


def test_the_noise_of_seeds_counts_where_lora_has_several_at_its_best_rate_only():
    # As a sweep has it: one seed at every rate, then more at the best.
    arms = LORA | {"lora-null": {"method": "lora-null", "factor": 0.5}}
    noisy, quiet = World(own_noise=0.3), World(own_noise=0.0)
    widths = []
    for world in (noisy, quiet):
        records = world.records(arms, seeds=(0,))
        records += world.records(arms, rates=(1e-3,), seeds=(1, 2))
        best = matched(compare(records, resamples=FEW), "lora-null").best
        widths.append(best.high / best.low)
    assert widths[0] > 2 * widths[1]


def test_what_lora_did_not_lose_is_judged_too():
    def shifted(records, by):
        """A set of which LoRA loses nothing, by a metric that may be negative."""
        return [
            one.model_copy(update={"evaluation": _with_answers(one.evaluation, by)})
            for one in records
        ]

    good = {"eva": {"method": "eva", "factor": 0.1}}
    records = shifted(World().records(LORA), -0.001) + shifted(World().records(good), 0.3)
    found = compare(records, resamples=FEW)
    assert found.title == "eva kept more on some sets and less on others"
    assert any("NLL on answers" in text and "lost more: eva" in text for text in found.words)


def _with_answers(report, lost):
    noise = np.random.default_rng(3).normal(0, 0.01, 120)
    nll = paired("nll", np.ones(120), 1 + lost + noise)
    further = report.items[1].model_copy(
        update={
            "name": "answers",
            "metrics": {"nll": nll.result},
            "row_values": {"nll": nll.by_row},
        }
    )
    return report.model_copy(update={"items": (*report.items, further)})


def test_a_run_that_diverged_is_chosen_nowhere_and_breaks_nothing():
    good = {"eva": {"method": "eva", "factor": 0.1}}
    records = World().records(LORA | good)
    nan = float("nan")
    place = next(i for i, r in enumerate(records) if r.method["name"] == "eva")
    one = records[place]
    training = one.training.model_copy(update={"validation_nll": nan})
    records[place] = one.model_copy(
        update={"training": training, "evaluation": _with_kl(one.evaluation, nan)}
    )
    assert by_name(compare(records, resamples=FEW))["eva"].chosen_rate == 1e-3


def _with_kl(report, value):
    kept = report.items[1]
    kl = kept.metrics["kl"]
    tuned = kl.tuned.model_copy(update={"mean": value, "low": value, "high": value})
    metrics = {"kl": kl.model_copy(update={"tuned": tuned})}
    return report.model_copy(
        update={"items": (report.items[0], kept.model_copy(update={"metrics": metrics}))}
    )


def test_scales_that_some_seeds_lack_are_left_out_aloud():
    records = World().records(LORA | {"eva": {"method": "eva"}})
    records[0] = records[0].model_copy(update={"scaled": []})
    notes = compare(records, resamples=FEW).notes
    assert (
        "Left out: lora at rate 0.0002 with ΔW times 0.25, 0.5 and 0.75, which some seeds lack."
        in notes
    )
