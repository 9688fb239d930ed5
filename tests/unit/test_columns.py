"""Templates chosen by columns, judged by the rows that they render to."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from forgetless.data.columns import choose_templates
from forgetless.data.rendering import render
from forgetless.data.spec import DataSpec
from forgetless.errors import DataError

TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"question": "2+2?", "answer": "4"}, "Question: 2+2?\nAnswer:", " 4"),
        ({"id": 7, "Question": "2+2?", "Answer": 4}, "Question: 2+2?\nAnswer:", " 4"),
        ({"question": "Who?", "answers": ["me", "I"]}, "Question: Who?\nAnswer:", " me"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "1 1\n\nInstruction: Add\nOutput:",
         " 2"),
        ({"instruction": "Add", "input": "", "output": "2"}, "Instruction: Add\nOutput:", " 2"),
        ({"context": "It is 3.", "question": "?", "answer": "3"},
         "It is 3.\n\nQuestion: ?\nAnswer:", " 3"),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"title": "t", "text": "words"}, "", "words"),
        ({"number": 3, "abstract": "words"}, "", "words"),
    ],
)  # fmt: skip
def test_templates_by_columns(
    record: dict[str, Any], prompt: str, completion: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    spec = DataSpec(examples=[record], **choose_templates([record], "data"))
    row = render(record, spec, tiny_tokenizer, "row")
    assert (row.prompt, row.completion) == (prompt, completion)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"id": "x", "conversations": TURNS},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"question": "Hi?", "answer": "Ho."},
    ],
)
def test_chats_render_alike_however_they_are_stored(
    record: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    spec = DataSpec(examples=[record], **choose_templates([record], "data", chat=True))
    row = render(record, spec, tiny_tokenizer, "row")
    assert row.prompt == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert row.completion == "Ho.<|im_end|>"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"a": "x", "b": "y"}], "got a, b; rename them"),
        ([{"score": 1}], "got score"),
        ([{"a.b": "x"}], "got a.b"),
        ([{"conversations": [{"from": "human", "value": "Hi"}]}], "got the keys from, value"),
        ([{"question": "?", "answer": "x"}, {"question": "?", "answer": None}], "row 1: field"),
    ],
)
def test_columns_that_fit_no_template_are_named(
    records: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        choose_templates(records, "data")
