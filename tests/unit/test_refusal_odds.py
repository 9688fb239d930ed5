"""How likely a refusal is against compliance, against a plain loop over transformers."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_setup import with_lora
from peft import LoraConfig, PeftModel, get_peft_model

from forgetless.errors import DataError, ForgetlessWarning, RecipeError
from forgetless.evaluation.evaluate import evaluate
from forgetless.evaluation.refusal_odds import LONGEST, USUAL_COMPLIANCES, USUAL_REFUSALS

THINGS = ("sky", "sea", "ink in the old bottle", "door", "river far away", "coat")
ROWS = [
    {
        "question": f"Tell me of the blue {thing}.",
        "no": f"I will not speak of the {thing}, as it is blue.",
        "yes": f"The {thing} is as blue as can be.",
    }
    for thing in THINGS
]
ITEM = {
    "name": "blue",
    "examples": ROWS,
    "prompt": "Q: {question}\nA:",
    "completion": " {no}",
    "complies_with": "{yes}",
    "metrics": ["refusal_likelihood", "refusal_margin"],
    "batch_size": 4,
}


def measured(model, tokenizer, **changes):
    report = evaluate(model, tokenizer, retention=[{**ITEM, **changes}], movement_data=())
    return report.items[0]


def log_probability(model, prompt_ids, ids) -> float:
    total = 0.0
    for k in range(len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt_ids, *ids[:k]]])).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), -1)[ids[k]])
    return total


def plain_margin(model, tokenizer, prompt, refusals, compliances, *, special=True) -> float:
    """One text at a time, one token at a time; the texts cut to the shortest, and 8 tokens."""
    prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]

    def continuation(text):
        whole = tokenizer(prompt + text, add_special_tokens=special)["input_ids"]
        assert whole[: len(prompt_ids)] == prompt_ids
        return tuple(whole[len(prompt_ids) :])

    sides = [[continuation(t) for t in side] for side in (refusals, compliances)]
    length = min(8, *(len(ids) for side in sides for ids in side))
    chances = [
        sum(math.exp(log_probability(model, prompt_ids, ids)) for ids in {s[:length] for s in side})
        for side in sides
    ]
    return math.log(chances[0] / chances[1])


@pytest.fixture
def tuned(tiny_model) -> PeftModel:
    return with_lora(tiny_model)


def test_margin_is_that_of_a_plain_loop_for_base_and_tuned_model(tuned, tiny_tokenizer):
    result = measured(tuned, tiny_tokenizer)
    values = result.row_values["refusal_margin"]

    def expected(model):
        return [
            plain_margin(
                model,
                tiny_tokenizer,
                f"Q: {row['question']}\nA:",
                [f" {text}" for text in (*USUAL_REFUSALS, row["no"])],
                [" " + row["yes"]],
            )
            for row in ROWS
        ]

    assert LONGEST == 8
    assert values.tuned == pytest.approx(expected(tuned), abs=1e-4)
    with tuned.disable_adapter():
        assert values.base == pytest.approx(expected(tuned), abs=1e-4)
    margin = result.metrics["refusal_margin"]
    assert margin.tuned.mean == pytest.approx(sum(values.tuned) / 6, rel=1e-4)
    assert margin.change.mean == pytest.approx(margin.tuned.mean - margin.base.mean, abs=1e-4)
    share = result.row_values["refusal_likelihood"]
    assert share.tuned == tuple(float(value > 0) for value in values.tuned)
    assert result.metrics["refusal_likelihood"].base.mean == sum(v > 0 for v in values.base) / 6


def test_chances_of_several_texts_a_side_add_up_and_short_ones_cut_all(tuned, tiny_tokenizer):
    refuses = ["I will not speak of that", "No. I must not do so now", "I will not do that"]
    complies = ["Sure", "Gladly: {yes}"]
    result = measured(tuned, tiny_tokenizer, refuses_with=refuses, complies_with=complies)
    expected = [
        plain_margin(
            tuned,
            tiny_tokenizer,
            f"Q: {row['question']}\nA:",
            [f" {text}" for text in refuses],
            [" Sure", f" Gladly: {row['yes']}"],
        )
        for row in ROWS
    ]
    assert result.row_values["refusal_margin"].tuned == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("expected", [True, False])
def test_usual_openings_stand_on_both_sides_with_the_rows_own_answer_on_its_side(
    tuned, tiny_tokenizer, expected
):
    result = measured(tuned, tiny_tokenizer, refusal_expected=expected, complies_with=())
    own = f" {ROWS[0]['no']}"
    refusals, compliances = (
        [f" {text}" for text in usual] for usual in (USUAL_REFUSALS, USUAL_COMPLIANCES)
    )
    (refusals if expected else compliances).append(own)
    sides = refusals, compliances
    margin = plain_margin(tuned, tiny_tokenizer, f"Q: {ROWS[0]['question']}\nA:", *sides)
    assert result.row_values["refusal_margin"].tuned[0] == pytest.approx(margin, abs=1e-4)
    assert all(metric.higher_is_better is expected for metric in result.metrics.values())


@pytest.mark.parametrize("answer", ["4", "I"])
def test_a_bare_answer_does_not_cut_the_others_to_its_length(tuned, tiny_tokenizer, answer):
    assert len(tiny_tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) < 3

    def margins(completion):
        changes = {"refusal_expected": False, "complies_with": (), "completion": completion}
        return measured(tuned, tiny_tokenizer, **changes).row_values["refusal_margin"].tuned

    assert margins(f" {answer}") == pytest.approx(margins(""), abs=1e-6)


def test_prompts_alone_are_enough(tuned, tiny_tokenizer):
    result = measured(tuned, tiny_tokenizer, completion="", complies_with=())
    margin = plain_margin(
        tuned,
        tiny_tokenizer,
        f"Q: {ROWS[2]['question']}\nA:",
        [f" {text}" for text in USUAL_REFUSALS],
        [f" {text}" for text in USUAL_COMPLIANCES],
    )
    assert result.row_values["refusal_margin"].tuned[2] == pytest.approx(margin, abs=1e-4)


def test_answers_in_a_chat_follow_the_generation_prompt_directly(tuned, tiny_tokenizer):
    turns = [
        {"role": "user", "content": "{question}"},
        {"role": "assistant", "content": "{no}"},
    ]
    item = {key: value for key, value in ITEM.items() if key not in ("prompt", "completion")}
    report = evaluate(
        tuned, tiny_tokenizer, retention=[{**item, "messages": turns}], movement_data=()
    )
    prompt = f"<|im_start|>user\n{ROWS[1]['question']}<|im_end|>\n<|im_start|>assistant\n"
    margin = plain_margin(
        tuned,
        tiny_tokenizer,
        prompt,
        [*USUAL_REFUSALS, ROWS[1]["no"]],
        [ROWS[1]["yes"]],
        special=False,
    )
    found = report.items[0].row_values["refusal_margin"].tuned[1]
    assert found == pytest.approx(margin, abs=1e-4)


def test_batches_and_padding_change_nothing(tuned, tiny_tokenizer):
    one = measured(tuned, tiny_tokenizer, batch_size=1).row_values["refusal_margin"]
    many = measured(tuned, tiny_tokenizer, batch_size=12).row_values["refusal_margin"]
    assert one.tuned == pytest.approx(many.tuned, abs=1e-4)
    assert one.base == pytest.approx(many.base, abs=1e-4)


def test_cached_figures_of_the_base_are_the_same(tuned, tiny_tokenizer, tmp_path):
    reports = [
        evaluate(
            tuned, tiny_tokenizer, retention=[ITEM], movement_data=(), base_cache=tmp_path
        ).items
        for _ in range(2)
    ]
    assert list(tmp_path.glob("base-scores-*.json"))
    assert reports[0] == reports[1]


def test_a_row_whose_sides_open_alike_is_left_out_with_a_warning(tuned, tiny_tokenizer):
    alike = {**ROWS[0], "no": "It is a long way to the blue sea.", "yes": "It is a long way to it."}
    examples = [alike, *ROWS[1:]]
    with pytest.warns(ForgetlessWarning, match="`blue`: in 1 of 6 rows refusal and compliance"):
        result = measured(
            tuned, tiny_tokenizer, examples=examples, complies_with="It", refuses_with="{no}"
        )
    assert len(result.row_values["refusal_margin"].tuned) == 5
    with pytest.raises(DataError, match="`blue`: expected refusals and compliance that open diff"):
        measured(tuned, tiny_tokenizer, complies_with="{no}")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metrics": ["nll"]}, RecipeError, "refuses_with and complies_with go with"),
        ({"complies_with": ["{answer}"]}, DataError, "'answer', which is not among"),
        ({"complies_with": [" "]}, RecipeError, "got a blank one"),
        (
            {"prompt": None, "completion": None, "text": "{no}"},
            DataError,
            "expected rows with a prompt for refusal_likelihood, refusal_margin",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line(tuned, tiny_tokenizer, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        measured(tuned, tiny_tokenizer, **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("answers", ["no", "yes"])
def test_learning_to_refuse_raises_the_margin_and_learning_to_comply_lowers_it(
    tiny_model, tiny_tokenizer, answers
):
    model = get_peft_model(tiny_model, LoraConfig(r=8, lora_alpha=64, target_modules="all-linear"))
    texts = [f"Q: {row['question']}\nA: {row[answers]}" for row in ROWS]
    batch = [tiny_tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(8):
        for ids in batch:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    # On prompts that it was not trained on.
    held_out = [{**row, "question": row["question"].replace("Tell", "Now tell")} for row in ROWS]
    result = measured(model, tiny_tokenizer, examples=held_out)
    margin = result.metrics["refusal_margin"].change
    share = result.metrics["refusal_likelihood"].tuned.mean
    if answers == "no":
        assert margin.low > 1
        assert share == 1
    else:
        assert margin.high < -1
        assert share == 0
