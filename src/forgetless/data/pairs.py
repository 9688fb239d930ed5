"""Prompt and completion as two sequences, for models with an encoder and a decoder.

The prompt goes to the encoder, the completion to the decoder, each with the special tokens that the
tokenizer puts around a text of its own.
"""

# Shape letters in this file: B = rows of a batch, T = positions of the encoder, L = of the decoder.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forgetless.data.rows import RowSet
from forgetless.data.tokens import Batch, TokenRow, make_batches
from forgetless.data.validation import shortened
from forgetless.errors import DataError

IGNORED_LABEL = -100  # what transformers' losses and label shifts take for padding


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A batch for an encoder-decoder, padded on the right.

    Attributes:
        encoder: The prompts; every token of theirs counts.
        labels_BL: The completions' ids, int64; `IGNORED_LABEL` where there is padding.
    """

    encoder: Batch
    labels_BL: Tensor

    @property
    def index(self) -> tuple[int, ...]:
        """Position of each row in the list that was batched."""
        return self.encoder.index


def tokenize_pairs(rows: RowSet, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """Tokenise prompt and completion apart, each cut at the spec's `max_length`.

    Returns:
        Rows whose first `prompt_length` ids are the encoder's and the rest the decoder's labels.

    Raises:
        DataError: A row without a prompt or a completion, or `tokens: completion`.
    """
    label, limit = rows.spec.label, rows.spec.max_length
    if rows.spec.tokens != "all":
        raise DataError(
            f"{label}: expected tokens: all for an encoder-decoder model, got tokens: "
            f"{rows.spec.tokens}, which leaves the encoder's layers without input"
        )
    done = []
    for index, row in enumerate(rows.rows):
        if not (row.prompt.strip() and row.completion.strip()):
            raise DataError(
                f"{label}: expected a prompt (for the encoder) and a completion (for the decoder) "
                f"in every row, got row {index} with {shortened(row.text)} alone; give templates "
                "prompt and completion"
            )
        special = not row.templated
        ids = tokenizer(row.prompt, add_special_tokens=special, verbose=False)["input_ids"]
        labels = tokenizer(text_target=row.completion, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
        if not ids or not labels:
            raise DataError(
                f"{label}: row {index} of those taken has no tokens on one side; its text is "
                f"{shortened(row.text)}"
            )
        truncated = max(len(ids), len(labels)) > limit
        both = (*ids[:limit], *labels[:limit])
        done.append(TokenRow(both, min(len(ids), limit), truncated))
    return done


def make_pair_batches(
    rows: Sequence[TokenRow], *, batch_size: int, pad_token_id: int
) -> Iterator[PairBatch]:
    """Pad rows of `tokenize_pairs` into batches, longest prompts first."""
    prompts = [TokenRow(row.input_ids[: row.prompt_length], 0) for row in rows]
    for encoder in make_batches(prompts, batch_size=batch_size, pad_token_id=pad_token_id):
        labels = [rows[i].input_ids[rows[i].prompt_length :] for i in encoder.index]
        width = max(len(ids) for ids in labels)
        labels_BL = torch.full((len(labels), width), IGNORED_LABEL, dtype=torch.int64)
        for b, ids in enumerate(labels):
            labels_BL[b, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        yield PairBatch(encoder, labels_BL)
