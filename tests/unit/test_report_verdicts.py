"""Verdicts: what rows must show before one run is said to have done better than another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgetless.evaluation.pairing import divergence, paired
from forgetless.experiments.headline import headline
from forgetless.experiments.record import Record
from forgetless.experiments.runs import name_runs
from forgetless.experiments.verdicts import judge
from report_records import item, kl, metric, record


def figures(gain: float, lost: float) -> tuple:
    """One gain item (last number, in shares) and one retention item (KL, in nats)."""
    return (
        item("sums", "gain", metric("last_number", 0.1, 0.1 + gain, 0.06)),
        item("capitals", "retention", kl(lost)),
    )


def title(records: list[Record]) -> str:
    return headline(name_runs(records)).title


def paired_record(
    label: str, method: str, sums: Sequence[float], **facts: Sequence[float]
) -> Record:
    """200 rows of `last number` on sums (base 0), and metrics of facts by row (base 0 but KL)."""
    results = {}
    for name, values in {"last_number": sums, **facts}.items():
        measured = (
            divergence(np.array(values), np.ones(len(values)))
            if name == "kl"
            else paired(name, np.zeros(len(values)), np.array(values))
        )
        results[name] = measured
    gain = item("sums", "gain", results["last_number"].result)
    kept = item("facts", "retention", *(results[name].result for name in facts))
    rows = {name: found.by_row for name, found in results.items()}
    items = (
        gain.model_copy(update={"row_values": {"last_number": rows.pop("last_number")}}),
        kept.model_copy(update={"row_values": rows}),
    )
    return record(label, method, items)


def ones(count: int) -> list[float]:
    return [1.0] * count + [0.0] * (200 - count)


def test_one_significant_gain_beside_one_that_is_not_is_no_difference():
    kls = [0.1 + i % 7 / 100 for i in range(200)]
    # 8 rows are a significant gain, 4 are none, and 4 rows apart are no significant difference.
    lora = paired_record("LoRA", "lora", ones(8), kl=kls)
    method = paired_record("X", "x", ones(4), kl=kls)
    runs = name_runs([lora, method])
    verdict = judge(runs[1], runs[0])
    assert not verdict.lora_won
    assert not verdict.method_won
    assert "did better than X" not in title([lora, method])


def test_a_method_that_gained_nothing_has_not_won_by_staying_at_the_base():
    lora = paired_record("LoRA", "lora", ones(8), kl=[0.5 + i % 7 / 100 for i in range(200)])
    method = paired_record("X", "x", ones(4), kl=[0.01 + i % 7 / 1000 for i in range(200)])
    runs = name_runs([lora, method])
    assert not judge(runs[1], runs[0]).method_won
    assert title([lora, method]).endswith("X gained nothing significant")


def test_a_tenth_of_a_small_gain_is_not_the_same_gain():
    def at(gain: float, kl_: float) -> Record:
        before = np.full(200, 2.0) + np.arange(200) % 5 / 100
        change = paired("nll", before, before - gain + np.arange(200) % 3 / 1000)
        found = item("text", "gain", change.result)
        found = found.model_copy(update={"row_values": {"nll": change.by_row}})
        return record(
            f"{gain}", "lora" if gain > 0.01 else "x", (found, item("t", "retention", kl(kl_)))
        )

    runs = name_runs([at(0.046, 0.5), at(0.0049, 0.01)])
    assert judge(runs[1], runs[0]).gain == "less"


def test_kl_at_the_rounding_floor_of_a_16_bit_base_decides_nothing():
    def at(label: str, method: str, value: float) -> Record:
        kls = [value * (1 + i % 7 / 10) for i in range(200)]
        return paired_record(label, method, ones(100), kl=kls)  # the records' base is bfloat16

    assert (
        judge(*reversed(name_runs([at("L", "lora", 0.002), at("X", "x", 0.001)]))).forgot
        == "unclear"
    )
    assert judge(*reversed(name_runs([at("L", "lora", 0.02), at("X", "x", 0.01)]))).forgot == "less"


def test_metrics_that_disagree_about_forgetting_are_both_named():
    def at(label: str, method: str, kl_: float, known: int) -> Record:
        kls = [kl_ * (1 + i % 7 / 10) for i in range(200)]
        return paired_record(label, method, ones(100), kl=kls, greedy_match=ones(known))

    records = [at("LoRA", "lora", 0.05, 195), at("X", "x", 0.01, 140)]
    runs = name_runs(records)
    assert not judge(runs[1], runs[0]).method_won
    assert "forgot less than plain LoRA on facts by KL but more on facts by greedy match" in title(
        records
    )


def test_runs_with_other_train_rows_or_answer_lengths_are_not_compared():
    first = record("LoRA", "lora", figures(0.5, 0.1))
    data = [
        d.model_copy(update={"fingerprint": "0" * 16}) if d.role == "train" else d
        for d in first.data
    ]
    other = record("X", "x", figures(0.6, 0.1), data=data)
    assert "the train rows differ" in title([first, other])

    def limited(label: str, method: str, tokens: int) -> Record:
        made = record(label, method, figures(0.5, 0.1))
        name = made.evaluation.items[0].name
        recipe = {"evaluation": {"gain": [{"name": name, "max_new_tokens": tokens}]}}
        return made.model_copy(update={"recipe": made.recipe | recipe})

    assert "max_new_tokens of" in title([limited("LoRA", "lora", 4), limited("X", "x", 256)])


def test_a_method_is_held_against_the_best_plain_lora_of_its_seed():
    def lora(rate: str, gain: float, loss: float, seed: int = 0) -> Record:
        made = record(f"LoRA {rate}", "lora", figures(gain, 0.1), seed=seed)
        return made.model_copy(
            update={"training": made.training.model_copy(update={"validation_nll": loss})}
        )

    records = [
        lora("weak", 0.1, 0.9),
        lora("best", 0.5, 0.3),
        lora("of another seed", 0.6, 0.1, seed=1),
        record("X", "x", figures(0.5, 0.1)),
    ]
    said = headline(name_runs(records))
    assert "plain LoRA (LoRA best)" in said.title
    assert any("validation NLL" in note for note in said.notes)


def test_lora_with_a_regulariser_is_a_method_of_its_own_not_the_baseline():
    """Also where it has another seed: two runs of one seed each are not two seeds of one method."""
    lora = record("lora", "lora", figures(0.3, 0.5))
    held = record("lora + kl", "lora", figures(0.3, 0.01))
    training = {**held.recipe.get("training", {}), "regularisers": [{"name": "kl", "weight": 1.0}]}
    held = held.model_copy(update={"recipe": {**held.recipe, "training": training}})
    runs = name_runs([lora, held])
    assert [run.is_lora for run in runs] == [True, False]
    said = headline(runs)
    assert "no method to hold against them" not in said.title
    assert "lora + kl" in said.title
    other_seed = held.model_copy(update={"seed": lora.seed + 1})
    assert any("One seed" in note for note in headline(name_runs([lora, other_seed])).notes)
    plus = {**lora.recipe.get("training", {}), "lora_plus_ratio": 16.0}
    faster = lora.model_copy(update={"recipe": {**lora.recipe, "training": plus}})
    assert not name_runs([faster])[0].is_lora
