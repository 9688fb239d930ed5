"""Token rows and padded batches with the mask of tokens that count."""

# Shape letters in this file: B = rows of a batch, T = positions.

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forgetless.data.rows import Row, RowSet
from forgetless.data.spec import Tokens
from forgetless.data.validation import shortened
from forgetless.errors import DataError


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One tokenised row.

    Attributes:
        input_ids: Token ids of prompt and completion.
        prompt_length: How many of them belong to the prompt; 0 for plain text.
        truncated: Whether tokens beyond `max_length` were cut off.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded batch.

    Attributes:
        input_ids_BT: Token ids, int64.
        attention_mask_BT: 1 for tokens, 0 for padding, int64.
        kept_BT: Which tokens count (calibration: all or the completion's), bool; never padding.
        index: Position of each row in the list that was batched.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    kept_BT: Tensor
    index: tuple[int, ...]


def tokenize(
    rows: RowSet, tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = False
) -> list[TokenRow]:
    """Tokenise rendered rows, prompt and completion as one text, cut at the spec's `max_length`.

    Rows that a chat template rendered bring their special tokens; others get the tokenizer's own.
    A token that spans the boundary of prompt and completion belongs to the completion.

    Train rows and the gain side of an evaluation get the end-of-sequence token, preserve rows and
    the retention side do not: gain is scored on exactly the tokens that were trained, retention on
    the text alone (docs/decisions/0007-gain-is-scored-with-the-end-of-sequence-token.md).

    Args:
        rows: Rendered rows.
        tokenizer: The model's.
        append_eos: End rows that no chat template rendered with the end-of-sequence token.

    Raises:
        DataError: A row has no tokens, or there is no end-of-sequence token to append.
    """
    if append_eos and tokenizer.eos_token_id is None and not all(r.templated for r in rows.rows):
        raise DataError(
            f"{rows.spec.label}: expected a tokenizer with an end-of-sequence token, got one "
            "without; set tokenizer.eos_token"
        )
    done: list[TokenRow | None] = [None] * len(rows.rows)
    for templated in (False, True):
        chosen = [index for index, row in enumerate(rows.rows) if row.templated == templated]
        if not chosen:
            continue
        special = not templated
        texts = _encode(tokenizer, [rows.rows[i].text for i in chosen], special)
        prompts = _encode(tokenizer, [rows.rows[i].prompt for i in chosen], special)
        for index, whole, prompt in zip(chosen, texts, prompts, strict=True):
            row = rows.rows[index]
            ids, prompt_length = _at_boundary(tokenizer, row, whole, prompt)
            if append_eos and not templated and ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
            if not ids:
                raise DataError(
                    f"{rows.spec.label}: row {index} of those taken has no tokens; its text is "
                    f"{shortened(row.text)}"
                )
            limit = rows.spec.max_length
            done[index] = TokenRow(
                tuple(ids[:limit]), min(prompt_length, limit, len(ids)), len(ids) > limit
            )
    return [row for row in done if row is not None]


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool
) -> list[list[int]]:
    # verbose=False: no warning about long texts, they are truncated and counted by the caller.
    encoded = tokenizer(
        list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _at_boundary(
    tokenizer: PreTrainedTokenizerBase, row: Row, whole: list[int], prompt: list[int]
) -> tuple[list[int], int]:
    """Ids of the row, and how many of them are the prompt's."""
    if not row.prompt:
        return whole, 0
    if whole[: len(prompt)] == prompt:
        return whole, len(prompt)
    # Tokens merge across the boundary, or the tokenizer ends every text with a special token.
    special = not row.templated
    if not tokenizer.is_fast:
        completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        return [*prompt, *completion], len(prompt)
    encoded = tokenizer(
        row.text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    for index, (start, end) in enumerate(encoded["offset_mapping"]):
        # Special tokens have the empty span (0, 0). The end decides: byte-level tokenizers leave
        # the space at its front out of a token's span.
        if start != end and end > len(row.prompt):
            return whole, index
    return whole, len(whole)


def make_batches(
    rows: Sequence[TokenRow],
    *,
    batch_size: int,
    pad_token_id: int,
    tokens: Tokens = "all",
    padding_side: Literal["left", "right"] = "right",
    sort_by_length: bool = True,
) -> Iterator[Batch]:
    """Pad rows into batches.

    Args:
        rows: Tokenised rows.
        batch_size: Rows a batch; the last one may have fewer.
        pad_token_id: What to fill with; the mask hides it.
        tokens: Which tokens `kept_BT` marks.
        padding_side: Where the filling goes.
        sort_by_length: Longest rows first: least padding, and a batch too large for memory fails at
            once. `Batch.index` leads back to the order given.
    """
    assert batch_size >= 1
    order = list(range(len(rows)))
    if sort_by_length:
        order.sort(key=lambda index: -len(rows[index].input_ids))
    for start in range(0, len(order), batch_size):
        index = tuple(order[start : start + batch_size])
        yield _pad([rows[i] for i in index], index, pad_token_id, tokens, padding_side)


def _pad(
    rows: Sequence[TokenRow],
    index: tuple[int, ...],
    pad_token_id: int,
    tokens: Tokens,
    padding_side: Literal["left", "right"],
) -> Batch:
    width = max(len(row.input_ids) for row in rows)
    input_ids_BT = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    kept_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for b, row in enumerate(rows):
        length = len(row.input_ids)
        first = width - length if padding_side == "left" else 0
        input_ids_BT[b, first : first + length] = torch.tensor(row.input_ids, dtype=torch.int64)
        attention_mask_BT[b, first : first + length] = 1
        skipped = row.prompt_length if tokens == "completion" else 0
        kept_BT[b, first + skipped : first + length] = True
    return Batch(input_ids_BT, attention_mask_BT, kept_BT, index)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, else the end-of-sequence token, else 0; the tokenizer stays as it is."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return 0 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def fingerprint_token_rows(rows: Iterable[TokenRow]) -> str:
    """Hash of the rows in their order, of all that is trained or calibrated on; 32 hex digits."""
    state = hashlib.sha256()
    for row in rows:
        state.update(f"{row.prompt_length}:{','.join(map(str, row.input_ids))};".encode())
    return state.hexdigest()[:32]


def has_target(row: TokenRow) -> bool:
    """Whether a row has a completion token with a token before it."""
    return len(row.input_ids) > max(row.prompt_length, 1)


def count_truncated(rows: Sequence[TokenRow]) -> int:
    """Rows that were cut at `max_length`."""
    return sum(row.truncated for row in rows)


def count_without_completion(rows: Sequence[TokenRow]) -> int:
    """Rows with no completion token left, most often cut at `max_length`: nothing to learn from."""
    return sum(row.prompt_length >= len(row.input_ids) for row in rows)
