"""A trainer's own train data as calibration batches: what it tokenised, masked and packed.

Rows go through the trainer's collator and are taken apart again, so that whatever the trainer does
(templates, truncation, masks, packing, padding-free batches, preference pairs) is seen as the model
will see it. Packed documents come back one by one: they do not attend to each other in training.
"""

# Shape letters in this file: B = rows of a batch, T = positions of a row.

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from forgetless.data.spec import Tokens
from forgetless.data.tokens import Batch
from forgetless.errors import DataError
from forgetless.training.loss import IGNORED


@dataclass(frozen=True, slots=True)
class TrainedRow:
    """One document as the trainer feeds it.

    Attributes:
        input_ids_T: Its tokens, without padding.
        learned_T: Which of them the loss looks at, bool.
    """

    input_ids_T: Tensor
    learned_T: Tensor


def trained_rows(trainer: Trainer, *, limit: int, batch_size: int, seed: int) -> list[TrainedRow]:
    """Take a trainer's train rows through its collator; those with nothing to learn are left out.

    Args:
        trainer: Before `.train()`; its samplers and random state are not touched.
        limit: Most rows of the data set to take, drawn with `seed`; the first ones of a stream.
        batch_size: Rows that are collated at once.
        seed: Seed of the draw.

    Raises:
        DataError: No train data, a batch without token ids, or nothing to learn in it.
    """
    if trainer.train_dataset is None:
        raise DataError("trainer: expected a train_dataset, got none; give the trainer one")
    dataset, collate = trainer.train_dataset, trainer.data_collator
    # As the trainer's own data loader does; it cannot be asked for without drawing from its RNG.
    if isinstance(dataset, Dataset):
        dataset = trainer._remove_unused_columns(dataset)
    else:
        collate = trainer._get_collator_with_removed_columns(collate)
    records = list(_chosen(dataset, limit, seed))
    rows = [
        row
        for start in range(0, len(records), batch_size)
        for row in rows_of_batch(collate(records[start : start + batch_size]))
    ]
    if not rows:
        raise DataError(
            f"trainer: expected train rows with tokens to learn, got none in {len(records)} rows; "
            "raise max_length where they are truncated, or look at the labels"
        )
    return rows


def rows_of_batch(batch: Mapping[str, Any]) -> Iterator[TrainedRow]:
    """The documents of a collated batch that have a token to learn.

    Args:
        batch: `input_ids` (B, T) with any of `attention_mask`, `position_ids` and `labels` or
            `completion_mask`, all (B, T). Without a mask every position is a token, and a position
            of 0 begins a document.

    Raises:
        DataError: No token ids, or a mask of another shape.
    """
    ids_BT = batch.get("input_ids")
    if not isinstance(ids_BT, Tensor) or ids_BT.ndim != 2:
        raise DataError(
            "trainer: expected batches with input_ids of shape (rows, tokens), got keys "
            f"{', '.join(sorted(batch))}; call forgetless.attach before the trainer instead"
        )
    present_BT, learned_BT = _present(batch, ids_BT), _learned(batch, ids_BT)
    for name, mask_BT in (("attention_mask", present_BT), ("labels", learned_BT)):
        if mask_BT.shape != ids_BT.shape:
            raise DataError(
                f"trainer: expected {name} of the shape of input_ids, {tuple(ids_BT.shape)}, got "
                f"{tuple(mask_BT.shape)} (an encoder-decoder?); call forgetless.attach before the "
                "trainer instead"
            )
    starts_BT = _document_starts(batch, ids_BT)
    for b in range(ids_BT.shape[0]):
        kept_T = present_BT[b]
        ids_T, learned_T = ids_BT[b][kept_T], learned_BT[b][kept_T]
        cuts = starts_BT[b][kept_T].nonzero()[:, 0].tolist()
        for first, last in itertools.pairwise(sorted({0, *cuts, len(ids_T)})):
            if learned_T[first:last].any():
                yield TrainedRow(ids_T[first:last], learned_T[first:last])


def calibration_batches(
    rows: Sequence[TrainedRow], *, batch_size: int, pad_token_id: int, tokens: Tokens
) -> Iterator[Batch]:
    """Pad documents into batches, longest first.

    Args:
        rows: From `trained_rows`.
        batch_size: Rows a batch.
        pad_token_id: What to fill with; the mask hides it.
        tokens: Count all tokens, or only those that the loss looks at.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids_T))
    for start in range(0, len(order), batch_size):
        index = tuple(order[start : start + batch_size])
        ids = [rows[i].input_ids_T for i in index]
        present_BT = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        learned_BT = pad_sequence([rows[i].learned_T for i in index], batch_first=True)
        yield Batch(
            input_ids_BT=pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            attention_mask_BT=present_BT,
            kept_BT=learned_BT if tokens == "completion" else present_BT.bool(),
            index=index,
        )


def _chosen(dataset: Any, limit: int, seed: int) -> Iterable[Any]:
    if not hasattr(dataset, "__len__"):  # a stream
        return itertools.islice(dataset, limit)
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:limit]
    return (dataset[index] for index in sorted(drawn.tolist()))


def _present(batch: Mapping[str, Any], ids_BT: Tensor) -> Tensor:
    mask_BT = batch.get("attention_mask")
    return torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()


def _learned(batch: Mapping[str, Any], ids_BT: Tensor) -> Tensor:
    if batch.get("completion_mask") is not None:  # TRL's preference pairs
        return batch["completion_mask"].bool()
    labels_BT = batch.get("labels")
    if labels_BT is None:
        return torch.ones_like(ids_BT, dtype=torch.bool)
    return labels_BT != IGNORED


def _document_starts(batch: Mapping[str, Any], ids_BT: Tensor) -> Tensor:
    """Positions of 0 in packed or padding-free batches; none where an attention mask is given."""
    positions_BT = batch.get("position_ids")
    if positions_BT is None or batch.get("attention_mask") is not None:
        return torch.zeros_like(ids_BT, dtype=torch.bool)
    return (positions_BT == 0).expand_as(ids_BT)
