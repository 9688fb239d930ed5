"""A trainer's collated batches, taken apart into the documents that it trains on."""

from __future__ import annotations

import itertools

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from forgetless.errors import DataError
from forgetless.training.trainer_rows import TrainedRow, calibration_batches, rows_of_batch

PAD = 0
DOCUMENTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
LABELS = [[-100, 2, 3], [-100, 5], [-100, -100, 8, -100]]
LEARNED = [[False, True, True], [False, True], [False, False, True, False]]


def as_lists(rows: list[TrainedRow]) -> list[tuple[list[int], list[bool]]]:
    return [(row.input_ids_T.tolist(), row.learned_T.tolist()) for row in rows]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("multiple", [None, 8])
def test_documents_come_back_from_padded_and_padding_free_batches(padding_free, multiple):
    collate = DataCollatorForLanguageModeling(
        PAD, padding_free=padding_free, pad_to_multiple_of=multiple
    )
    examples = [
        {"input_ids": ids, "labels": labels} for ids, labels in zip(DOCUMENTS, LABELS, strict=True)
    ]
    rows = list(rows_of_batch(collate(examples)))
    assert as_lists(rows) == list(zip(DOCUMENTS, LEARNED, strict=True))


def test_documents_come_back_from_packed_rows():
    packed = {
        "input_ids": [*itertools.chain(*DOCUMENTS)],
        "labels": [*itertools.chain(*LABELS)],
        "seq_lengths": [len(ids) for ids in DOCUMENTS],
    }
    single = {"input_ids": [10, 11], "labels": [-100, 11], "seq_lengths": [2]}
    batch = DataCollatorForLanguageModeling(PAD, padding_free=True)([packed, single])
    rows = list(rows_of_batch(batch))
    assert as_lists(rows) == [*zip(DOCUMENTS, LEARNED, strict=True), ([10, 11], [False, True])]


def test_both_answers_of_a_preference_pair_are_learned_from():
    batch = DataCollatorForPreference(PAD)(
        [{"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}]
    )
    assert as_lists(list(rows_of_batch(batch))) == [
        ([1, 2, 3, 4, 5], [False, False, True, True, True]),
        ([1, 2, 6], [False, False, True]),
    ]


def test_a_document_without_a_token_to_learn_is_left_out():
    batch = {
        "input_ids": torch.tensor([[1, 2], [3, 4]]),
        "labels": torch.tensor([[-100, -100], [-100, 4]]),
    }
    assert as_lists(list(rows_of_batch(batch))) == [([3, 4], [False, True])]


@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_calibration_counts_all_tokens_or_the_learned_ones_and_never_padding(tokens):
    rows = [
        TrainedRow(torch.tensor(ids), torch.tensor(learned))
        for ids, learned in zip(DOCUMENTS, LEARNED, strict=True)
    ]
    batches = list(calibration_batches(rows, batch_size=2, pad_token_id=PAD, tokens=tokens))
    assert [batch.index for batch in batches] == [(2, 0), (1,)]
    for batch in batches:
        for b, index in enumerate(batch.index):
            present = batch.attention_mask_BT[b].bool()
            assert batch.input_ids_BT[b][present].tolist() == DOCUMENTS[index]
            kept = batch.kept_BT[b]
            assert not kept[~present].any()
            assert kept[present].tolist() == (
                [True] * len(DOCUMENTS[index]) if tokens == "all" else LEARNED[index]
            )


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3)}, "expected batches with input_ids .* pixel_values"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.ones(2, 5)},
            r"expected labels of the shape of input_ids, \(2, 3\), got \(2, 5\)",
        ),
        (
            {
                "input_ids": torch.ones(2, 3, dtype=torch.int64),
                "attention_mask": torch.ones(2, 1, 3, 3),
            },
            "expected attention_mask of the shape of input_ids",
        ),
    ],
)
def test_batches_of_another_kind_are_refused(batch, message):
    with pytest.raises(DataError, match=message):
        list(rows_of_batch(batch))
