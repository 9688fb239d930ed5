"""Whether an answer is one at all, against a plain loop over transformers."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_setup import with_lora

from forgetless.evaluation.coherence import is_coherent, repeated, scored_answer
from forgetless.evaluation.evaluate import evaluate
from forgetless.evaluation.generation import generate_greedy

THINGS = ("sky", "sea", "ink in the old bottle", "door", "river far away", "coat")
ITEM = {
    "name": "things",
    "examples": [{"thing": thing} for thing in THINGS],
    "prompt": "Tell me of the {thing}.",
    "completion": "",
    "metrics": ["coherent"],
    "max_new_tokens": 12,
    "batch_size": 4,
}


@pytest.fixture
def tuned(tiny_model):
    with torch.no_grad():  # sure of what it says, so that what another model says is unlikely
        tiny_model.lm_head.weight.mul_(3)
    return with_lora(tiny_model)


def plain_nll(model, prompt_ids, ids) -> list[float]:
    """Of each token of an answer but the first, one forward pass a token."""
    found = []
    for k in range(1, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt_ids, *ids[:k]]])).logits[0, -1]
        found.append(-float(torch.log_softmax(logits.double(), -1)[ids[k]]))
    return found


def answers_of(model, tokenizer):
    prompts = [tokenizer(f"Tell me of the {thing}.")["input_ids"] for thing in THINGS]
    texts = generate_greedy(model, tokenizer, prompts, max_new_tokens=12).texts
    ids = [tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"] for text in texts]
    return prompts, texts, ids


def test_answers_are_judged_by_the_base_after_the_same_prompt(tuned, tiny_tokenizer):
    result = evaluate(tuned, tiny_tokenizer, retention=[ITEM], movement_data=()).items[0]
    with tuned.disable_adapter():
        prompts, own_texts, own = answers_of(tuned, tiny_tokenizer)
    _, texts, ids = answers_of(tuned, tiny_tokenizer)
    with tuned.disable_adapter():
        usual = [n for p, one in zip(prompts, own, strict=True) for n in plain_nll(tuned, p, one)]
        theirs = [plain_nll(tuned, p, one) for p, one in zip(prompts, ids, strict=True)]
        ours = [plain_nll(tuned, p, one) for p, one in zip(prompts, own, strict=True)]
    bound = sum(usual) / len(usual) + 4

    def expected(texts, ids, costs):
        return tuple(
            float(
                any(map(str.isalnum, text))
                and (not cost or sum(cost) / len(cost) <= bound)
                and 2 * len({tuple(one[k : k + 4]) for k in range(1, len(one) - 3)})
                >= max(0, len(one) - 4)
            )
            for text, one, cost in zip(texts, ids, costs, strict=True)
        )

    values = result.row_values["coherent"]
    assert values.tuned == expected(texts, ids, theirs)
    assert values.base == expected(own_texts, own, ours)
    # Random weights, randomly changed: what they write is not the base's language.
    assert 0 in values.tuned
    assert values.base != values.tuned


@pytest.mark.parametrize(
    ("text", "above", "passes"),
    [
        ("The sky is blue today.", 1.0, True),
        ("Paris", 0.0, True),
        ("7", 0.0, True),
        ("", 0.0, False),
        (" \n", 0.0, False),
        ("...!?", 0.0, False),
        ("The sky is blue today.", 4.0, True),
        ("The sky is blue today.", 4.01, False),
        ("The sky is blue today.", math.inf, False),
        ("blue " * 12, 0.0, False),
        ("of the sky and the sea " * 6, 0.0, False),
    ],
)
def test_void_loops_and_gibberish_do_not_pass_and_short_answers_do(
    tiny_tokenizer, text, above, passes
):
    prompt = tiny_tokenizer("Tell me of the sky.")["input_ids"]
    assert is_coherent(text, scored_answer(tiny_tokenizer, prompt, text), above) is passes


def test_repetition_is_the_share_of_4_grams_that_stood_there_before():
    assert repeated([1, 2, 3]) == 0
    assert repeated([1, 2, 3, 4, 5]) == 0
    # (1 2 3 1), (2 3 1 2), (3 1 2 3), and once more the first.
    assert repeated([1, 2, 3, 1, 2, 3, 1]) == pytest.approx(1 / 4)
    assert repeated([5] * 10) == pytest.approx(6 / 7)


def test_batches_and_the_cache_change_nothing(tuned, tiny_tokenizer, tmp_path):
    def measure(**changes):
        report = evaluate(
            tuned,
            tiny_tokenizer,
            retention=[{**ITEM, **changes}],
            movement_data=(),
            base_cache=tmp_path,
        )
        return report.items[0].row_values["coherent"]

    first = measure()
    assert list(tmp_path.glob("base-scores-*.json"))
    assert measure() == first
    assert measure(batch_size=1) == first


def test_no_reference_is_needed(tuned, tiny_tokenizer):
    item = {**ITEM, "metrics": ["coherent", "refusal"]}
    metrics = evaluate(tuned, tiny_tokenizer, retention=[item], movement_data=()).items[0].metrics
    assert list(metrics) == ["coherent", "refusal"]
    assert metrics["coherent"].higher_is_better
