"""`evaluate` as a whole: both sides, the base beside them, the model left as it was."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from evaluation_setup import GAIN, QUESTIONS, TEXTS, with_lora
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from forgetless.data.rows import Row, RowSet
from forgetless.data.spec import DataSpec
from forgetless.errors import AdapterError, DataError, ForgetlessWarning, RecipeError
from forgetless.evaluation import judged, measure, scored
from forgetless.evaluation.evaluate import evaluate
from forgetless.evaluation.generation import Generated, generate_greedy
from forgetless.evaluation.items import EvaluationItem
from forgetless.evaluation.likelihood import compare_rows
from forgetless.evaluation.results import EvaluationReport, HitLimit


@pytest.fixture
def tuned(tiny_model) -> PeftModel:
    return with_lora(tiny_model)


def metric(report: EvaluationReport, item: str, name: str):
    return next(i for i in report.items if i.name == item).metrics[name]


def test_report_holds_both_sides_with_the_base_beside(tuned, tiny_tokenizer):
    report = evaluate(tuned, tiny_tokenizer, gain=[GAIN], retention=[TEXTS])

    apples, kept = report.items
    assert (apples.side, apples.name, apples.rows) == ("gain", "apples", 6)
    assert (kept.side, kept.name, kept.rows) == ("retention", "examples", 3)
    assert list(apples.metrics) == ["nll", "greedy_match", "last_number"]
    assert list(kept.metrics) == ["nll", "kl"]
    assert kept.metrics["kl"].base is None
    assert kept.metrics["kl"].tuned.mean > 0
    assert not kept.metrics["nll"].higher_is_better
    assert apples.metrics["last_number"].higher_is_better
    nll = apples.metrics["nll"]
    assert nll.change.mean == pytest.approx(nll.tuned.mean - nll.base.mean)
    assert len(apples.samples) == 3
    assert apples.samples[0].prompt == "Question: How many apples are there in row 0?\nAnswer:"
    assert apples.samples[0].reference == "there are 0 apples"
    assert kept.samples == ()
    assert report.movement is not None
    assert report.movement.update_size > 0
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report


def test_nll_is_per_token_and_gain_rows_end_with_eos(tuned, tiny_tokenizer):
    report = evaluate(tuned, tiny_tokenizer, gain=[GAIN], retention=[{**GAIN, "name": "kept"}])

    def naive(eos: bool) -> float:
        total, count = 0.0, 0
        for row in QUESTIONS:
            prompt = tiny_tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            ids = tiny_tokenizer(f"Question: {row['question']}\nAnswer:{row['answer']}")
            ids = ids["input_ids"] + [tiny_tokenizer.eos_token_id] * eos
            with torch.no_grad():
                logits = tuned.eval()(input_ids=torch.tensor([ids])).logits[0].double()
            for position in range(len(prompt), len(ids)):
                total -= float(torch.log_softmax(logits[position - 1], 0)[ids[position]])
                count += 1
        return total / count

    assert metric(report, "apples", "nll").tuned.mean == pytest.approx(naive(True), rel=1e-5)
    assert metric(report, "kept", "nll").tuned.mean == pytest.approx(naive(False), rel=1e-5)


def test_base_figures_are_those_of_the_bare_model(make_tiny_model, tiny_tokenizer):
    alone = get_peft_model(make_tiny_model(), LoraConfig(r=1, target_modules=["q_proj"]))
    expected = evaluate(alone, tiny_tokenizer, gain=[GAIN], retention=[TEXTS])

    report = evaluate(with_lora(make_tiny_model()), tiny_tokenizer, gain=[GAIN], retention=[TEXTS])

    for item, other in zip(report.items, expected.items, strict=True):
        for name in item.metrics:
            if name != "kl":
                assert item.metrics[name].base == other.metrics[name].base
                assert other.metrics[name].change.mean == 0
        assert [s.base for s in item.samples] == [s.tuned for s in other.samples]
    assert metric(expected, "examples", "kl").tuned.mean == 0


def test_model_is_left_as_it_was(tuned, tiny_tokenizer):
    tuned.train()
    tuned.get_base_model().model.layers[0].eval()
    frozen = next(p for n, p in tuned.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    state = {n: p.clone() for n, p in tuned.named_parameters()}
    modes = {n: m.training for n, m in tuned.named_modules()}
    flags = {n: p.requires_grad for n, p in tuned.named_parameters()}
    random = torch.get_rng_state()

    evaluate(tuned, tiny_tokenizer, gain=[GAIN], retention=[TEXTS], scale=0.5)

    assert {n: m.training for n, m in tuned.named_modules()} == modes
    assert {n: p.requires_grad for n, p in tuned.named_parameters()} == flags
    assert all(torch.equal(p, state[n]) for n, p in tuned.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in tuned.parameters())


def test_model_is_left_as_it_was_when_an_item_fails(tuned, tiny_tokenizer, monkeypatch):
    tuned.train()

    def fail(*_args, **_kwargs):
        raise AdapterError("stopped")

    monkeypatch.setattr(scored, "score_rows", fail)
    with pytest.raises(AdapterError, match="stopped"):
        evaluate(tuned, tiny_tokenizer, gain=[GAIN])
    assert tuned.training
    assert not tuned.get_base_model().model.layers[0].self_attn.q_proj.disable_adapters


def test_dropout_of_a_model_in_training_does_not_reach_the_figures(tuned, tiny_tokenizer):
    tuned.train()
    first = evaluate(tuned, tiny_tokenizer, gain=[GAIN])
    tuned.eval()
    assert evaluate(tuned, tiny_tokenizer, gain=[GAIN]).items == first.items


def test_scale_zero_is_the_base_and_scale_one_the_adapter(tuned, tiny_tokenizer):
    nothing = evaluate(tuned, tiny_tokenizer, retention=[TEXTS], scale=0.0)
    whole = evaluate(tuned, tiny_tokenizer, retention=[TEXTS])
    half = evaluate(tuned, tiny_tokenizer, retention=[TEXTS], scale=0.5)

    assert metric(nothing, "examples", "kl").tuned.mean == pytest.approx(0, abs=1e-6)
    assert (
        0 < metric(half, "examples", "kl").tuned.mean < metric(whole, "examples", "kl").tuned.mean
    )
    assert half.scale == 0.5
    assert half.movement.update_size == pytest.approx(whole.movement.update_size / 2, rel=1e-5)


def test_base_and_adapter_folder_give_the_same_as_the_live_model(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    tuned = with_lora(make_tiny_model())
    expected = evaluate(tuned, tiny_tokenizer, gain=[GAIN], retention=[TEXTS])
    tuned.save_pretrained(tmp_path / "adapter")
    base = make_tiny_model()
    base.train()
    names = [name for name, _ in base.named_modules()]

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # The tiny model never ends its answers.
        warnings.filterwarnings("ignore", message=".*max_new_tokens")
        reports = [
            evaluate(
                base, tiny_tokenizer, adapter=tmp_path / "adapter", gain=[GAIN], retention=[TEXTS]
            )
            for _ in range(2)
        ]

    for report in reports:
        assert report.items == expected.items
        assert report.movement == expected.movement
    assert [name for name, _ in base.named_modules()] == names
    assert base.training
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_generated_metrics_judge_what_the_models_generate(tuned, tiny_tokenizer):
    prompts = [f"Question: {row['question']}\nAnswer:" for row in QUESTIONS]
    ids = [tiny_tokenizer(p)["input_ids"] for p in prompts]
    tuned.eval()
    texts = generate_greedy(tuned, tiny_tokenizer, ids, max_new_tokens=6).texts
    # Every second row accepts what the tuned model says: the metric must see 3 of 6.
    rows = [
        {"prompt": prompt, "completion": text.split("\n")[0] if i % 2 else "never said"}
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    assert all(row["completion"].strip() for row in rows)

    item = {"name": "own", "examples": rows, "metrics": ["exact_match", "f1"], "max_new_tokens": 6}
    report = evaluate(tuned, tiny_tokenizer, gain=[item], samples=0)

    assert metric(report, "own", "exact_match").tuned.mean == pytest.approx(0.5)
    assert metric(report, "own", "f1").tuned.mean >= 0.5
    assert report.items[0].samples == ()


def test_truncated_rows_are_counted_and_rows_without_a_token_left_out_aloud(tuned, tiny_tokenizer):
    short = {"prompt": "Question:", "completion": " 12"}
    long = {"prompt": "Question: how many apples are there? " * 10, "completion": " 12"}
    item = {"name": "cut", "examples": [short, long], "max_length": 24}

    with pytest.warns(ForgetlessWarning, match="1 of 2 rows have no token to score"):
        report = evaluate(tuned, tiny_tokenizer, gain=[item], samples=0)

    assert (report.items[0].rows, report.items[0].truncated_rows) == (2, 1)
    assert metric(report, "cut", "nll").tuned.n == 1


def test_movement_data_of_the_caller_are_used_and_an_empty_list_leaves_movement_out(
    tuned, tiny_tokenizer
):
    given = RowSet(DataSpec(examples=["x"]), (Row("", "The quick brown fox jumps."),))
    report = evaluate(tuned, tiny_tokenizer, movement_data=[given])
    assert report.items == ()
    assert report.movement.update_size > 0
    assert evaluate(tuned, tiny_tokenizer, gain=[GAIN]).movement is None
    assert evaluate(tuned, tiny_tokenizer, retention=[TEXTS], movement_data=()).movement is None


def test_evaluation_items_and_files_are_accepted(tuned, tiny_tokenizer, tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("\n".join(TEXTS))
    item = EvaluationItem(name="texts", examples=TEXTS, metrics=("nll", "kl"))

    report = evaluate(tuned, tiny_tokenizer, retention=[item, str(path), {"path": str(path)}])

    assert [i.name for i in report.items] == ["texts", str(path), f"{path} (2)"]
    assert [list(i.metrics) for i in report.items] == [["nll", "kl"]] * 3


def test_batch_size_changes_no_figure_beyond_rounding(tuned, tiny_tokenizer):
    one = evaluate(tuned, tiny_tokenizer, gain=[{**GAIN, "batch_size": 1}])
    many = evaluate(tuned, tiny_tokenizer, gain=[{**GAIN, "batch_size": 6}])
    for name in GAIN["metrics"]:
        a, b = metric(one, "apples", name), metric(many, "apples", name)
        assert a.tuned.mean == pytest.approx(b.tuned.mean, rel=1e-5)
        assert a.change.low == pytest.approx(b.change.low, rel=1e-4, abs=1e-5)
    assert one.items[0].samples == many.items[0].samples


def test_adapter_trained_in_bfloat16_beside_a_float32_base_is_measured(tuned, tiny_tokenizer):
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    report = evaluate(tuned, tiny_tokenizer, gain=[GAIN], retention=[TEXTS])
    assert np.isfinite(metric(report, "examples", "kl").tuned.mean)


def test_kl_of_a_half_precision_base_warns_of_its_rounding(make_tiny_model, tiny_tokenizer):
    tuned = with_lora(make_tiny_model().bfloat16())
    with pytest.warns(ForgetlessWarning, match=r"bfloat16; KL below about 0\.003"):
        evaluate(tuned, tiny_tokenizer, retention=[TEXTS])


def test_progress_ends_every_stage_at_its_total(tuned, tiny_tokenizer):
    seen: dict[str, list[tuple[int, int]]] = {}

    evaluate(
        tuned, tiny_tokenizer, gain=[GAIN], retention=[TEXTS],
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )  # fmt: skip

    assert {"apples: NLL", "apples: generation", "examples: KL", "movement"} <= seen.keys()
    for steps in seen.values():
        assert steps[-1][0] == steps[-1][1] > 0
        assert steps == sorted(steps)


def test_diverged_adapter_is_refused_with_item_and_row(tuned, tiny_tokenizer):
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(float("inf"))
    with pytest.raises(AdapterError, match=r"`apples`: expected a finite NLL from the tuned model"):
        evaluate(tuned, tiny_tokenizer, gain=[GAIN])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, RecipeError, "at least one gain or retention item"),
        ({"gain": GAIN}, RecipeError, "expected a list"),
        ({"gain": [{**GAIN, "metric": ["nll"]}]}, RecipeError, r"gain\.0.*did you mean `metrics`"),
        ({"gain": [GAIN], "retention": [GAIN]}, RecipeError, "a second time"),
        (
            {"gain": [{"name": "t", "examples": TEXTS, "metrics": ["f1"]}]},
            DataError,
            "expected rows with a prompt for f1",
        ),
        (
            {"gain": [{**GAIN, "completion": "none", "metrics": ["last_number"]}]},
            DataError,
            "row 0: expected a number",
        ),
        ({"gain": [{**GAIN, "labels": ["a"]}]}, RecipeError, "labels goes with .* contains"),
        ({"gain": [{**GAIN, "refusal_expected": False}]}, RecipeError, "goes with .* refusal"),
        ({"gain": [GAIN], "adapter": "somewhere"}, AdapterError, "got a PeftModel"),
        ({"gain": [GAIN], "scale": float("nan")}, RecipeError, "expected a finite scale, got nan"),
        ({"gain": [GAIN], "samples": -1}, RecipeError, "samples of 0 or more, got -1"),
    ],
)
def test_bad_arguments_get_one_clear_line(tuned, tiny_tokenizer, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        evaluate(tuned, tiny_tokenizer, **arguments)
    assert "\n" not in str(raised.value)


def test_models_that_hold_no_separate_adapter_are_refused(make_tiny_model, tiny_tokenizer):
    with pytest.raises(AdapterError, match="expected a PeftModel"):
        evaluate(make_tiny_model(), tiny_tokenizer, gain=[GAIN])
    merged = with_lora(make_tiny_model())
    merged.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the base"):
        evaluate(merged, tiny_tokenizer, gain=[GAIN])
    disabled = with_lora(make_tiny_model())
    with disabled.disable_adapter(), pytest.raises(AdapterError, match="got it disabled"):
        evaluate(disabled, tiny_tokenizer, gain=[GAIN])
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = get_peft_model(make_tiny_model(), config)
    with pytest.raises(AdapterError, match="PROMPT_TUNING"):
        evaluate(prompted, tiny_tokenizer, gain=[GAIN])


def test_scores_of_the_base_are_the_same_before_and_after_training_steps(tuned, tiny_tokenizer):
    before = evaluate(tuned, tiny_tokenizer, gain=[GAIN])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.7)
    after = evaluate(tuned, tiny_tokenizer, gain=[GAIN])
    assert metric(after, "apples", "nll").base == metric(before, "apples", "nll").base
    assert metric(after, "apples", "nll").tuned != metric(before, "apples", "nll").tuned


def test_rows_behind_every_figure_are_in_the_report(tuned, tiny_tokenizer):
    apples, kept = evaluate(tuned, tiny_tokenizer, gain=[GAIN], retention=[TEXTS]).items
    for item, name in ((apples, "nll"), (kept, "nll"), (kept, "kl")):
        rows = item.row_values[name]
        mean = np.average(rows.tuned, weights=rows.weights)
        assert len(rows.tuned) == item.rows
        assert mean == pytest.approx(item.metrics[name].tuned.mean, rel=1e-4)
    assert len(apples.row_values["last_number"].base) == apples.rows
    assert kept.row_values["kl"].base == ()


def test_zero_discordant_rows_leave_an_interval_with_a_width(tuned, tiny_tokenizer):
    report = evaluate(tuned, tiny_tokenizer, gain=[GAIN], movement_data=(), scale=0.0)
    change = metric(report, "apples", "greedy_match").change
    assert change.low < 0 == change.mean < change.high


def test_samples_show_rows_where_base_and_tuned_differ(tuned, tiny_tokenizer, monkeypatch):
    answers = iter([["same"] * 5 + ["12"], ["same"] * 5 + ["5"]])
    monkeypatch.setattr(
        judged, "generate_greedy", lambda *_, **__: Generated(next(answers), [False] * 6)
    )
    report = evaluate(tuned, tiny_tokenizer, gain=[GAIN], samples=1)
    (shown,) = report.items[0].samples
    assert (shown.base, shown.tuned) == ("12", "5")
    assert (shown.base_right, shown.tuned_right) == (False, True)


def answering(monkeypatch, base: Generated, tuned: Generated) -> None:
    """Let the base, then the tuned model, generate this."""
    answers = iter([base, tuned])
    monkeypatch.setattr(judged, "generate_greedy", lambda *_, **__: next(answers))


def test_answers_that_the_limit_cut_off_are_counted_and_many_are_said_aloud(
    tuned, tiny_tokenizer, monkeypatch
):
    whole, cut = Generated(["1"] * 6, [False] * 6), Generated(["so it is"] * 6, [True] * 6)
    answering(monkeypatch, whole, cut)
    with pytest.warns(
        ForgetlessWarning, match="`apples`.*cut off 0 of 6 answers of the base and 6 of the tuned"
    ):
        (apples,) = evaluate(tuned, tiny_tokenizer, gain=[GAIN]).items
    assert apples.hit_limit == HitLimit(base=0, tuned=6)

    # An answer that is over before the next question began was not cut off.
    answering(monkeypatch, whole, Generated(["1\nQuestion: how"] * 6, [True] * 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgetlessWarning)
        (apples,) = evaluate(tuned, tiny_tokenizer, gain=[GAIN]).items
    assert apples.hit_limit == HitLimit(base=0, tuned=0)


def test_items_of_older_records_have_no_count_of_cut_answers(tuned, tiny_tokenizer):
    (item,) = evaluate(tuned, tiny_tokenizer, gain=[GAIN]).items
    old = item.model_dump(exclude={"hit_limit"})
    assert type(item).model_validate(old).hit_limit is None


@pytest.mark.parametrize("expected", [True, False])
def test_refusals_of_harmless_prompts_are_the_worse_the_more(
    tuned, tiny_tokenizer, monkeypatch, expected
):
    refuse, comply = ["I can't help with that."] * 6, ["Sure, it is 5."] * 6
    answering(monkeypatch, Generated(comply, [False] * 6), Generated(refuse, [False] * 6))
    item = {**GAIN, "metrics": ["refusal", "f1"], "refusal_expected": expected}
    report = evaluate(tuned, tiny_tokenizer, retention=[item], movement_data=())
    assert metric(report, "apples", "refusal").higher_is_better is expected
    assert metric(report, "apples", "refusal").change.mean == 1
    assert metric(report, "apples", "f1").higher_is_better


def test_labels_of_an_item_make_a_list_of_them_wrong(tuned, tiny_tokenizer, monkeypatch):
    rows = [{"prompt": f"Question: {i}?", "completion": " aunt"} for i in range(6)]
    item = {"name": "kin", "examples": rows, "metrics": ["contains"], "labels": ["aunt", "son"]}
    answering(
        monkeypatch,
        Generated(["She is his aunt."] * 6, [False] * 6),
        Generated(["aunt, son"] * 6, [False] * 6),
    )
    report = evaluate(tuned, tiny_tokenizer, gain=[item])
    found = metric(report, "kin", "contains")
    assert (found.base.mean, found.tuned.mean) == (1, 0)


def test_fewer_than_six_rows_are_never_significant(tuned, tiny_tokenizer):
    report = evaluate(tuned, tiny_tokenizer, retention=[TEXTS])
    change = metric(report, "examples", "nll").change
    assert change.n == 3
    assert change.low <= 0 <= change.high
    assert metric(report, "examples", "kl").tuned.low == 0


def test_divergence_that_is_not_finite_is_refused_with_item_and_row(
    tuned, tiny_tokenizer, monkeypatch
):
    def compare(*arguments, **options):
        base, ours, kl = compare_rows(*arguments, **options)
        kl[2] = float("nan")
        return base, ours, kl

    monkeypatch.setattr(measure, "compare_rows", compare)
    with pytest.raises(AdapterError, match=r"`examples`: expected a finite KL .* nan at row 2"):
        evaluate(tuned, tiny_tokenizer, retention=[TEXTS])


def test_names_cannot_reach_the_terminal_as_commands_nor_turn_its_text(tuned, tiny_tokenizer):
    named = {**GAIN, "name": "a\x1b[31mb\u202ec\u2067d\ne"}
    text = str(evaluate(tuned, tiny_tokenizer, gain=[named], samples=0))
    assert "gain: a\ufffd[31mb\ufffdc\ufffdd e (6 rows)" in text
    assert not set(text) & set("\x1b\u202e\u2067")


def test_report_prints_as_a_table_of_80_columns(tuned, tiny_tokenizer):
    long = {**GAIN, "name": "apples " * 30}
    text = str(evaluate(tuned, tiny_tokenizer, gain=[long], retention=[TEXTS]))
    assert max(map(len, text.splitlines())) <= 80
    for word in ("base", "tuned", "95 % interval", "nll", "kl", "update size", "leakage"):
        assert word in text


def test_movement_at_a_scale_is_derived_from_the_whole(tuned, tiny_tokenizer):
    whole = evaluate(tuned, tiny_tokenizer, retention=[TEXTS]).movement
    half = evaluate(tuned, tiny_tokenizer, retention=[TEXTS], scale=0.5).movement
    derived = whole.scaled(0.5)
    for name in ("update_size", "drift", "leakage", "relative_norm"):
        assert getattr(derived, name) == pytest.approx(getattr(half, name), rel=1e-4)
        for layer, moved in half.layers.items():
            value = getattr(derived.layers[layer], name)
            assert value == pytest.approx(getattr(moved, name), rel=1e-4)
