"""PEFT's board: what its code computes, computed here in its own words."""

from __future__ import annotations

import pytest
import torch
from evaluation_setup import TEXTS, with_lora

import forgetless

MAX_LENGTH = 12  # cuts the longest text
ITEM = {
    "name": "general text",
    "examples": [{"text": text} for text in TEXTS],
    "text": "{text}",
    "max_length": MAX_LENGTH,
    "metrics": ["nll", "board_loss"],
    "batch_size": 2,
}


def by_the_board(model, tokenizer) -> float:
    """All texts in one left-padded batch, no position ids, logits and tokens unshifted."""
    batch = tokenizer(TEXTS, truncation=True, max_length=MAX_LENGTH)
    batch = tokenizer.pad(batch, return_tensors="pt", padding_side="left")
    with torch.inference_mode():
        logits = model(**batch).logits
    losses = []
    for one, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):
        tokens = int(mask.sum())
        losses += torch.nn.functional.cross_entropy(
            one[-tokens:], ids[-tokens:], reduction="none"
        ).tolist()
    return sum(losses) / len(losses)


def test_the_board_loss_and_its_rise_are_those_of_the_boards_code(tiny_model, tiny_tokenizer):
    model = with_lora(tiny_model)
    report = forgetless.evaluate(model, tiny_tokenizer, retention=[ITEM], movement_data=())
    found = report.items[0].metrics["board_loss"]
    tuned = by_the_board(model, tiny_tokenizer)
    with model.disable_adapter():
        base = by_the_board(model, tiny_tokenizer)
    assert found.base.mean == pytest.approx(base, rel=1e-5)
    assert found.tuned.mean == pytest.approx(tuned, rel=1e-5)
    assert found.change.mean == pytest.approx(tuned - base, abs=1e-5)
    assert not found.higher_is_better
    # It is another figure than the likelihood of the next token.
    assert abs(found.base.mean - report.items[0].metrics["nll"].base.mean) > 1e-3


def test_prompts_count_and_the_base_is_kept_under_a_name_of_its_own(
    tiny_model, tiny_tokenizer, tmp_path
):
    model = with_lora(tiny_model)
    whole = {**ITEM, "examples": [{"text": "one two three four"}]}
    parts = {**whole, "examples": [{"a": "one two", "b": " three four"}]}
    parts = {**parts, "prompt": "{a}", "completion": "{b}", "max_length": 40}
    del parts["text"]
    reports = [
        forgetless.evaluate(
            model, tiny_tokenizer, retention=[item], movement_data=(), base_cache=tmp_path
        )
        for item in ({**whole, "max_length": 40}, parts)
    ]
    losses = [report.items[0].metrics["board_loss"].base.mean for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    again = forgetless.evaluate(
        model, tiny_tokenizer, retention=[parts], movement_data=(), base_cache=tmp_path
    )
    assert again.items == reports[1].items
