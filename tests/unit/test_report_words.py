"""The headline's words on constructed figures: wins, ties, losses, and what must not be claimed."""

from __future__ import annotations

import math

import pytest

from forgetless.escaping import clean
from forgetless.evaluation.results import Estimate, EvaluationReport, MetricResult, RowValues
from forgetless.experiments.headline import headline, summary_lines
from forgetless.experiments.markdown import markdown_table
from forgetless.experiments.numbers import (
    change_text,
    pair_text,
    plain,
    range_text,
    seconds_text,
    value_text,
)
from forgetless.experiments.record import Record
from forgetless.experiments.runs import name_runs
from forgetless.experiments.verdicts import judge
from report_records import item, kl, metric, nll, realistic_records, record, trade_off


def figures(gain: float, lost: float, half: float = 0.06) -> tuple:
    """One gain item (last number, in shares) and one retention item (KL, in nats)."""
    return (
        item("sums", "gain", metric("last_number", 0.1, 0.1 + gain, half)),
        item("capitals", "retention", kl(lost)),
    )


def pair(lora: tuple[float, float], method: tuple[float, float]) -> list[Record]:
    return [
        record("LoRA", "lora", figures(*lora)),
        record("LoRA-Null", "lora-null", figures(*method)),
    ]


def title(records: list[Record]) -> str:
    return headline(name_runs(records)).title


@pytest.mark.parametrize(
    ("lora", "method", "words"),
    [
        (
            (0.5, 0.6),
            (0.5, 0.01),
            "LoRA-Null moved less from the base than plain LoRA; "
            "which gained more, these rows cannot tell",
        ),
        (
            (0.3, 0.6),
            (0.5, 0.01),
            "LoRA-Null gained more than plain LoRA and moved less from the base",
        ),
        (
            (0.5, 0.1),
            (0.5, 0.1),
            "LoRA-Null against plain LoRA: these rows cannot tell which did better",
        ),
        (
            (0.5, 0.6),
            (0.2, 0.01),
            "LoRA-Null moved less from the base than plain LoRA, but gained less",
        ),
        (
            (0.3, 0.1),
            (0.5, 0.6),
            "LoRA-Null gained more than plain LoRA, but moved further from the base",
        ),
        (
            (0.5, 0.01),
            (0.5, 0.6),
            "LoRA-Null moved further from the base than plain LoRA; "
            "which gained more, these rows cannot tell",
        ),
        (
            (0.6, 0.01),
            (0.3, 0.6),
            "Plain LoRA did better than LoRA-Null: it gained more and moved less from the base",
        ),
        (
            (0.6, 0.1),
            (0.3, 0.1),
            "LoRA-Null gained less than plain LoRA; "
            "which moved further from the base, these rows cannot tell",
        ),
        (
            (0.02, 0.6),
            (0.01, 0.1),
            "No run gained anything significant: there is nothing to compare",
        ),
        (
            (0.5, 0.6),
            (0.01, 0.1),
            "Plain LoRA did better than LoRA-Null at learning: "
            "LoRA-Null gained nothing significant",
        ),
    ],
)
def test_headline_says_who_did_better(lora, method, words):
    assert title(pair(lora, method)) == words


def test_headline_names_where_a_method_forgot_less_and_where_more():
    def both(a: float, b: float) -> tuple:
        return (*figures(0.5, a), item("elements", "retention", kl(b)))

    records = [record("LoRA", "lora", both(0.1, 0.5)), record("X", "sc-lora", both(0.5, 0.1))]
    assert "moved less from the base than plain LoRA on elements but more on capitals" in title(
        records
    )


def test_forgot_less_on_some_items_only_names_them():
    def both(a: float) -> tuple:
        return (*figures(0.5, a), item("elements", "retention", kl(0.3)))

    records = [record("LoRA", "lora", both(0.5)), record("X", "sc-lora", both(0.1))]
    assert title(records).startswith(
        "X moved less from the base than plain LoRA on capitals; which gained"
    )


def rows_record(label: str, method: str, right: range, kls: float) -> Record:
    """A run that answers the rows `right` of 200 rightly, and whose KL by row varies around one."""
    answers = [float(i in right) for i in range(200)]
    divergence = [kls * (1 + i % 7 / 10) for i in range(200)]
    share = len(right) / 200
    items = []
    for one, name, values in (
        (item("sums", "gain", metric("last_number", 0.0, share, 0.07)), "last_number", answers),
        (item("capitals", "retention", kl(kls)), "kl", divergence),
    ):
        by_row = {name: RowValues(tuned=tuple(values))}
        items.append(one.model_copy(update={"row_values": by_row}))
    return record(label, method, tuple(items))


@pytest.mark.parametrize(
    ("right", "words", "detail"),
    [
        (
            range(2, 100),
            "X moved less from the base than plain LoRA at the same gain",
            "the same within the ma",
        ),
        (
            range(10, 100),
            "X moved less from the base than plain LoRA, but gained less",
            "X gained 45.0\u00a0points to LoRA's 50.0 (last number on sums): "
            "5.0\u00a0points less (paired −",
        ),
        (
            range(40, 130),
            "X moved less from the base than plain LoRA; which gained more, these rows cannot tell",
            "a difference that these rows cannot tell from 0 (paired −",
        ),
    ],
)
def test_methods_are_compared_row_by_row_where_records_hold_rows(right, words, detail):
    records = [rows_record("LoRA", "lora", range(100), 0.88), rows_record("X", "x", right, 0.0035)]
    said = headline(name_runs(records))
    assert said.title == words
    assert any(detail in line for line in said.details), said.details
    assert "row by row on the same rows" in said.notes[0]


def test_rows_of_another_fingerprint_or_none_are_not_paired():
    records = [
        rows_record("LoRA", "lora", range(100), 0.88),
        rows_record("X", "x", range(10, 100), 0.0035),
    ]
    unknown = records[1].model_copy(update={"data": []})
    said = headline(name_runs([records[0], unknown]))
    assert said.title.endswith("which gained more, these rows cannot tell")
    assert "no figures row by row" in said.notes[0]


def test_ratio_of_a_kl_at_the_rounding_floor_is_not_claimed():
    def details(dtype: str) -> str:
        records = pair((0.5, 0.6), (0.5, 0.0025))
        models = [r.model.model_copy(update={"dtype": dtype}) for r in records]
        both = [r.model_copy(update={"model": m}) for r, m in zip(records, models, strict=True)]
        return " ".join(headline(name_runs(both)).details)

    assert "240 times less" in details("float32")
    assert "times less" not in details("bfloat16")
    assert "rounding floor of a 16-bit base, about 0.003" in details("bfloat16")


def test_gain_in_nll_alone_is_a_gain_and_is_named():
    silent = metric("last_number", 0.0, 0.0, 0.02)
    some = metric("last_number", 0.1, 0.12, 0.05)
    for share in (silent, some):
        one = record("A", "lora", (item("sums", "gain", share, nll(8.9, 0.5)),))
        assert title([one]).startswith("A gained 8.40 NLL on sums")
        assert any("NLL on sums" in str(c) for c in headline(name_runs([one])).runs[0].gained)


def test_large_kl_without_a_worse_nll_is_not_called_forgetting_nothing():
    kept = item("kept", "retention", kl(1.41), nll(2.0, 2.005))
    said = title([record("A", "lora", (*figures(0.5, 0.1)[:1], kept))])
    assert said.endswith("on sums; NLL on kept not significantly worse; KL 1.41")


def test_improvement_of_what_should_be_kept_is_called_better_and_keeps_its_digits():
    kept = item("kept", "retention", kl(0.1), nll(6.539, 6.536, 0.001))
    said = headline(name_runs([record("A", "lora", (*figures(0.5, 0.1)[:1], kept))]))
    (clause,) = [c for c in said.runs[0].forgot if "NLL" in c.rest]
    assert clause.lead == "−0.0030, better"
    assert "6.539 → 6.536" in clause.rest


def test_methods_with_the_same_verdict_share_a_clause():
    records = [*pair((0.3, 0.6), (0.5, 0.01)), record("SC-LoRA", "sc-lora", figures(0.5, 0.01))]
    assert (
        title(records)
        == "LoRA-Null and SC-LoRA gained more than plain LoRA and moved less from the base"
    )


def test_many_verdicts_are_counted_in_the_title_and_listed_below():
    records = [record("LoRA", "lora", figures(0.5, 0.1))]
    done = [(0.7, 0.01), (0.7, 0.02), (0.5, 0.1), (0.3, 0.6)]
    records += [record(f"{'method ' * 12}{n}", "x", figures(*k)) for n, k in enumerate(done)]
    said = headline(name_runs(records))
    assert said.title == (
        "4 comparisons with plain LoRA: the method did better in 2, plain LoRA in 1; "
        "1 unclear or a trade"
    )
    assert said.details[0].endswith("gained more than plain LoRA and moved less from the base.")


def test_labels_are_quoted_as_they_are():
    records = [
        record("LoRA", "lora", figures(0.5, 0.6)),
        record("null {lora} {run}", "lora-null", figures(0.5, 0.01)),
    ]
    assert title(records).startswith("null {lora} {run} moved less from the base than plain LoRA")


def test_change_whose_interval_contains_zero_is_not_significant():
    said = headline(name_runs([record("LoRA", "lora", figures(0.02, 0.1, half=0.05))]))
    assert "not significant" in said.runs[0].gained[0].lead
    assert said.title.startswith("LoRA gained nothing significant")


def test_one_row_gives_no_interval_and_no_claim():
    one = item("sums", "gain", metric("last_number", 0.0, 1.0, 0.0, n=1))
    said = headline(name_runs([record("LoRA", "lora", (one,))]))
    assert "one row, no interval" in said.runs[0].gained[0].rest
    assert "not significant" in said.runs[0].gained[0].lead


def test_zero_width_interval_away_from_zero_is_a_gain():
    sure = item("sums", "gain", metric("last_number", 0.0, 1.0, 0.0))
    assert title([record("LoRA", "lora", (sure,))]).startswith(
        "LoRA gained 100.0\u00a0points on sums"
    )


def test_lower_nll_counts_as_gain_and_higher_as_loss():
    better = record("A", "lora", (item("text", "gain", nll(1.5, 1.0)),))
    worse = record("A", "lora", (item("text", "gain", nll(1.0, 1.5)),))
    assert title([better]).startswith("A gained 0.500 NLL on text")
    assert title([worse]).startswith("A gained nothing significant")


def test_refusals_that_should_stay_rare_count_as_loss_when_they_rise():
    rose = metric("refusal", 0.05, 0.4, 0.05, higher=False)
    items = (*figures(0.5, 0.1), item("benign", "retention", rose))
    assert title([record("A", "lora", items)]).endswith("and forgot some of benign")


def test_quick_run_claims_nothing():
    records = pair((0.5, 0.6), (0.5, 0.01))
    quick = records[0].model_copy(update={"recipe": {**records[0].recipe, "claims": False}})
    said = headline(name_runs([quick, records[1]]))
    assert said.quick
    assert said.title == "Quick run: nothing is claimed"
    assert (said.runs, said.details) == ((), ())
    assert "claims nothing" in " ".join(summary_lines([quick]))
    assert "nothing is claimed" in markdown_table([quick])


def test_runs_on_other_models_or_other_rows_are_not_compared():
    first, second = pair((0.5, 0.6), (0.5, 0.01))
    other = second.model.model_copy(update={"fingerprint": "ffff"})
    assert "cannot be compared: the base models differ" in title(
        [first, second.model_copy(update={"model": other})]
    )
    half = second.model.model_copy(update={"fingerprint": "f", "dtype": "float32"})
    assert "the base model was loaded in bfloat16 and float32" in title(
        [first, second.model_copy(update={"model": half})]
    )
    rows = [d.model_copy(update={"fingerprint": "ffff"}) for d in second.data]
    assert "the rows of sums differ" in title([first, second.model_copy(update={"data": rows})])


def test_without_plain_lora_nothing_is_compared():
    records = pair((0.5, 0.6), (0.5, 0.01))[1:] * 2
    assert title(records) == "2 runs, and no plain LoRA to hold them against"


def test_labels_that_repeat_are_told_apart():
    first, second = (record("LoRA", "lora", figures(0.5, 0.1), seed=s) for s in (0, 1))
    assert [r.name for r in name_runs([first, second])] == ["LoRA, seed 0", "LoRA, seed 1"]
    assert [r.name for r in name_runs([first, first])] == ["LoRA (1)", "LoRA (2)"]
    other = first.model_copy(update={"recipe": {"output": "runs/lora-2e-4"}})
    assert [r.name for r in name_runs([first, other])] == ["LoRA, lora", "LoRA, lora-2e-4"]


def test_two_seeds_are_not_called_one():
    def says_one_seed(*seeds: int) -> bool:
        records = [record("LoRA", "lora", figures(0.5, 0.1), seed=seed) for seed in seeds]
        return any("One seed" in note for note in headline(name_runs(records)).notes)

    assert says_one_seed(0)
    assert not says_one_seed(0, 1)


def test_one_method_with_one_seed_is_told_beside_others_with_two():
    records = [record("LoRA", "lora", figures(0.5, 0.1), seed=seed) for seed in (0, 1)]
    records.append(record("X", "x", figures(0.5, 0.1)))
    assert any("have one seed only" in note for note in headline(name_runs(records)).notes)


def test_scaled_down_lora_is_what_scaling_would_have_cost():
    # At scale s: gain 0.8 s, KL 0.8 s². Gain 0.6 is scale 0.75, where KL is 0.45.
    def at(scale: float) -> tuple:
        return figures(0.8 * scale, 0.8 * scale**2)

    lora = record("LoRA", "lora", at(1.0), scaled=(EvaluationReport(items=at(0.5), scale=0.5),))

    def details(gain: float, kl_: float) -> tuple[str, ...]:
        runs = name_runs([lora, record("X", "x", figures(gain, kl_))])
        return judge(runs[1], runs[0]).details

    assert any("has KL 0.450 on capitals (against 0.010)" in d for d in details(0.6, 0.01))
    assert any("as well or better on 1 of 1" in d for d in details(0.6, 0.6))
    # A little more than LoRA's own gain, not to be told apart: LoRA as it is, KL 0.8.
    assert any("has KL 0.800 on capitals" in d for d in details(0.81, 0.01))
    never = "None of the measured scales of LoRA (0.5, 1) reaches"
    assert any(never in d for d in details(0.99, 0.01))
    assert not any(never in d for d in details(0.81, 0.01))


def test_summary_fits_in_80_columns_and_carries_no_control_characters():
    records = realistic_records()
    records[1] = records[1].model_copy(update={"label": "x" * 300 + "\x1b[31mred\r\n"})
    lines = summary_lines(records)
    assert lines
    assert max(map(len, lines)) <= 80
    assert not any(ord(c) < 32 for line in lines for c in line)


def test_summary_of_no_records_is_empty():
    assert (summary_lines([]), markdown_table([])) == ([], "")


def test_markdown_table_keeps_hostile_names_inside_their_cells():
    hostile = record("a | b\n| c <img src=x> [l](u) `d`", "lora", figures(0.5, 0.1))
    lines = markdown_table([hostile]).splitlines()
    assert lines[0] == "|  | base | a \\| b \\| c &lt;img src=x> \\[l\\](u) \\`d\\` |"
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines)


def test_markdown_table_has_kl_and_nll_first_and_the_base_beside():
    lines = markdown_table(realistic_records()[:2]).splitlines()
    assert lines[2].startswith("| Kept: capitals, KL | 0 | 0.630 (")
    assert lines[3].startswith("| Kept: capitals, NLL | 2.31 (")
    assert any("56.7 % (53.7 to 59.7) | 48.5 % (−8.2 pts; −11.2 to −5.2)" in x for x in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0046, "0.0046"), (0.63, "0.630"), (4.89, "4.89"), (51.27, "51.3"), (1234.5, "1234"),
        (0, "0"), (-0.1, "−0.100"), (6.1e-6, "6.1e-6"), (9.96e-4, "0.0010"), (0.0996, "0.100"),
        (0.9996, "1.00"), (9.996, "10.0"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_plain_figures_keep_about_three_digits(value, text):
    assert plain(value) == text


def test_shares_are_percents_and_points():
    assert value_text("f1", 0.635) == "63.5\u00a0%"
    assert change_text("f1", -0.042) == "−4.2\u00a0pts"
    assert change_text("f1", 0.0001) == "0.0\u00a0pts"
    assert change_text("nll", 0.31) == "+0.310"
    assert (
        range_text("f1", Estimate(mean=0, low=-0.08, high=0.005, n=9), change=True)
        == "−8.0 to +0.5"
    )
    assert range_text("f1", Estimate(mean=1, low=1, high=1, n=1)) == ""


def test_durations_read_as_a_person_says_them():
    assert [seconds_text(s) for s in (4.21, 125, 11_400)] == ["4.2 s", "2 min 05 s", "3 h 10 min"]


def test_clean_replaces_what_cannot_be_shown_or_written():
    assert clean("a\x00b\x1b[0m\ud800c\r\nd\te") == "a\ufffdb\ufffd[0m\ufffdc\nd\te"


def test_nan_figures_are_dashes_and_never_claims():
    broken = MetricResult(
        metric="nll", base=None, higher_is_better=False,
        tuned=Estimate(mean=math.nan, low=math.nan, high=math.nan, n=9),
        change=Estimate(mean=math.nan, low=math.nan, high=math.nan, n=9),
    )  # fmt: skip
    records = [
        record("A", "lora", (item("sums", "gain", broken), *trade_off((0.1,) * 3, 0.5, 0)[1:]))
    ]
    text = "\n".join(summary_lines(records)) + markdown_table(records)
    assert "nan" not in text.lower()
    assert title(records).startswith("A gained nothing significant")


def test_two_figures_side_by_side_have_as_many_digits() -> None:
    assert pair_text("nll", 6.7629, 6.763) == ("6.7629", "6.7630")
    assert pair_text("nll", 6.539, 6.536) == ("6.539", "6.536")


def test_the_interval_of_a_change_in_points_is_signed_as_other_changes_are() -> None:
    estimate = Estimate(mean=0.0, low=-0.324, high=0.324, n=9)
    assert range_text("exact_match", estimate, change=True) == "−32.4 to +32.4"
    assert range_text("exact_match", estimate.model_copy(update={"low": 0.1})) == "10.0 to 32.4"
    assert change_text("exact_match", 0.0).startswith("0.0")
