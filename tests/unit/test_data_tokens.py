"""Token rows never lose the boundary of prompt and completion; batches never count padding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from forgetless.data import (
    DataSpec,
    Row,
    RowSet,
    TokenRow,
    count_truncated,
    count_without_completion,
    make_batches,
    pad_token_id,
    tokenize,
)
from forgetless.data.tokens import fingerprint_token_rows
from forgetless.errors import DataError


def row_set(*rows: Row, **keys: Any) -> RowSet:
    return RowSet(DataSpec(examples=["unused"], **keys), rows)


@pytest.fixture
def merging() -> PreTrainedTokenizerBase:
    """Words of letters, where `ab` is one token: prompt `a` and completion `b` merge."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_plain_text_gets_the_tokenizers_defaults_and_nothing_else(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "What is the capital?"
    (row,) = tokenize(row_set(Row("", text)), tiny_tokenizer)
    assert list(row.input_ids) == tiny_tokenizer(text)["input_ids"]
    assert row.input_ids[0] == tiny_tokenizer.bos_token_id
    assert row.prompt_length == 0
    assert not row.truncated


def test_templated_rows_get_no_second_special_token(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Paris"}]
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    rows = row_set(Row(prompt, "Paris<|im_end|>", templated=True))
    (row,) = tokenize(rows, tiny_tokenizer, append_eos=True)
    # The template ends the turn with a line break that no model generates: one token less.
    whole = tiny_tokenizer.apply_chat_template(turns, return_dict=False)
    assert list(row.input_ids) == whole[:-1]
    assert tiny_tokenizer.decode(row.input_ids[: row.prompt_length]) == prompt
    assert row.input_ids.count(tiny_tokenizer.eos_token_id) == 2


def test_the_end_token_follows_untemplated_rows_once_and_only_where_asked_for(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    eos = tiny_tokenizer.eos_token_id
    rows = row_set(Row("Question: ", "12"), Row("", "ends<|im_end|>"))
    plain = tokenize(rows, tiny_tokenizer)
    ended = tokenize(rows, tiny_tokenizer, append_eos=True)
    assert ended[0].input_ids == (*plain[0].input_ids, eos)
    assert ended[1] == plain[1]
    tiny_tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        tokenize(rows, tiny_tokenizer, append_eos=True)


def test_a_token_across_the_boundary_belongs_to_the_completion(
    merging: PreTrainedTokenizerBase,
) -> None:
    (row,) = tokenize(row_set(Row("ca", "bc")), merging)
    assert row.input_ids == (4, 5, 4)
    assert row.prompt_length == 1


def test_a_tokenizer_that_ends_every_text_does_not_hide_the_boundary(
    merging: PreTrainedTokenizerBase,
) -> None:
    merging._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (row,) = tokenize(row_set(Row("ca", "cb")), merging, append_eos=True)
    assert row.input_ids == (0, 4, 2, 4, 3, 1)
    assert row.prompt_length == 3


def test_without_offsets_prompt_and_completion_are_tokenised_apart(
    merging: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda _self: False))
    (row,) = tokenize(row_set(Row("ca", "bc")), merging)
    assert row.input_ids == (4, 2, 3, 4)
    assert row.prompt_length == 2


@given(prompt=st.text(max_size=12), completion=st.text(min_size=1, max_size=12))
def test_prompt_tokens_never_reach_into_the_completion(prompt: str, completion: str) -> None:
    tokenizer = byte_tokenizer()
    text = (prompt + completion).encode("utf-8", "replace")
    (row,) = tokenize(row_set(Row(prompt, completion)), tokenizer)
    decoded = tokenizer.decode(row.input_ids[: row.prompt_length]).encode("utf-8", "replace")
    assert len(row.input_ids) == len(text)
    assert row.prompt_length == len(prompt.encode("utf-8", "replace"))
    assert text.startswith(decoded)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_truncated_rows_are_marked_and_counted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = row_set(Row("Question: ", "how many apples are there?"), Row("", "12"), max_length=6)
    long, short = tokenize(rows, tiny_tokenizer)
    assert len(long.input_ids) == 6
    assert long.truncated
    assert not short.truncated
    assert count_truncated([long, short]) == 1
    exact = tokenize(row_set(Row("", "12"), max_length=len(short.input_ids)), tiny_tokenizer)
    assert not exact[0].truncated


def test_rows_whose_completion_was_cut_off_are_kept_and_counted(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = row_set(Row("The quick brown fox jumps over " * 3, "dog"), Row("a", "b"), max_length=5)
    tokens = tokenize(rows, tiny_tokenizer)
    assert tokens[0].prompt_length == 5
    assert count_without_completion(tokens) == 1


def test_rows_come_back_in_order_when_kinds_are_mixed(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = row_set(Row("", "a", templated=True), Row("", "b"), Row("", "c", templated=True))
    decoded = [tiny_tokenizer.decode(row.input_ids) for row in tokenize(rows, tiny_tokenizer)]
    assert decoded == ["a", "<|bos|>b", "c"]


def test_a_row_without_tokens_is_refused(merging: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="row 1 of those taken has no tokens"):
        tokenize(row_set(Row("", "a"), Row("", "?")), merging)


def random_rows(count: int) -> list[TokenRow]:
    generator = random.Random(0)
    rows = []
    for _ in range(count):
        length = generator.randint(1, 9)
        ids = tuple(generator.randrange(1, 99) for _ in range(length))
        rows.append(TokenRow(ids, generator.randint(0, length)))
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", ["all", "completion"])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_mask_keeps_the_same_tokens_however_rows_are_batched(
    side: Any, tokens: Any, sort: bool, batch_size: int
) -> None:
    rows = random_rows(20)
    seen: dict[int, list[int]] = {}
    for batch in make_batches(
        rows,
        batch_size=batch_size,
        pad_token_id=7,
        tokens=tokens,
        padding_side=side,
        sort_by_length=sort,
    ):
        assert batch.input_ids_BT.dtype == batch.attention_mask_BT.dtype == torch.int64
        assert batch.kept_BT.dtype == torch.bool
        assert not (batch.kept_BT & (batch.attention_mask_BT == 0)).any()
        assert (batch.input_ids_BT[batch.attention_mask_BT == 0] == 7).all()
        for b, index in enumerate(batch.index):
            present = batch.input_ids_BT[b][batch.attention_mask_BT[b] == 1]
            assert tuple(present.tolist()) == rows[index].input_ids
            seen[index] = batch.input_ids_BT[b][batch.kept_BT[b]].tolist()
            edge = -1 if side == "left" else 0
            assert batch.attention_mask_BT[b, edge] == 1
    expected = {
        i: list(row.input_ids[row.prompt_length if tokens == "completion" else 0 :])
        for i, row in enumerate(rows)
    }
    assert seen == expected


def test_sorted_batches_begin_with_the_longest_row_and_keep_ties_in_order() -> None:
    rows = [TokenRow((1,) * length, 0) for length in (2, 5, 2, 9)]
    order = [i for batch in make_batches(rows, batch_size=3, pad_token_id=0) for i in batch.index]
    assert order == [3, 1, 0, 2]


def test_no_rows_give_no_batches() -> None:
    assert list(make_batches([], batch_size=2, pad_token_id=0)) == []


def test_the_padding_token_is_found_without_changing_the_tokenizer(
    tiny_tokenizer: PreTrainedTokenizerBase, merging: PreTrainedTokenizerBase
) -> None:
    assert pad_token_id(tiny_tokenizer) == tiny_tokenizer.pad_token_id
    assert pad_token_id(merging) == merging.eos_token_id == 1
    assert merging.pad_token is None
    merging.eos_token = None
    assert pad_token_id(merging) == 0


def test_fingerprint_sees_tokens_boundary_and_order() -> None:
    rows = [TokenRow((1, 23), 1), TokenRow((4,), 0)]
    others = [
        [TokenRow((1, 2, 3), 1), TokenRow((4,), 0)],
        [TokenRow((1, 23), 0), TokenRow((4,), 0)],
        rows[::-1],
        rows[:1],
        [TokenRow((1, 23, 4), 1)],
    ]
    found = {fingerprint_token_rows(rows), *(fingerprint_token_rows(other) for other in others)}
    assert len(found) == 1 + len(others)
    assert all(len(digest) == 32 for digest in found)
    assert fingerprint_token_rows(iter(rows)) == fingerprint_token_rows(rows)
