"""The data of a run: rendered, checked against each other, split and tokenised."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetless.data.loading import load_rows
from forgetless.data.overlap import refuse_overlap
from forgetless.data.rows import RowSet
from forgetless.data.spec import DataSpec
from forgetless.data.tokens import TokenRow, count_truncated, tokenize
from forgetless.errors import DataError
from forgetless.evaluation.measure import LoadedItem, check_item
from forgetless.evaluation.results import Side
from forgetless.experiments.record import DataFacts
from forgetless.models.load import LoadedModel
from forgetless.recipe import Recipe
from forgetless.training.sft import learnable


@dataclass(frozen=True)
class Prepared:
    """All rows of a run.

    Attributes:
        train: Row sets to learn; what the method calibrates on, where it needs train data.
        preserve: Row sets to keep.
        train_rows: Tokens to train on, without the validation rows.
        validation_rows: Tokens held out of the train data.
        facts: For the record, by role and source.
        notes: What a user wants to know: how much was truncated or left out.
    """

    train: list[RowSet]
    preserve: list[RowSet]
    train_rows: list[TokenRow]
    validation_rows: list[TokenRow]
    facts: list[DataFacts]
    notes: list[str]


def prepare(
    recipe: Recipe,
    loaded: LoadedModel,
    *,
    cache: Path,
    advance: Callable[[int, int, str], None],
) -> Prepared:
    """Load every row that the recipe names, and refuse what would spoil a figure.

    Raises:
        DataError: Rows in two roles, an item that its metrics cannot measure, too few train rows.
        TrainingError: No train row has a completion.
    """

    def load(specs: Sequence[DataSpec], what: str) -> list[RowSet]:
        return [
            load_rows(
                spec,
                loaded.tokenizer,
                model=loaded.model,
                cache=cache,
                progress=lambda done, total: advance(done, total, what),
            )
            for spec in specs
        ]

    train = load(recipe.train_data, "train")
    preserve = load(recipe.preserve_data, "preserve")
    evaluation = recipe.evaluation
    sides: list[tuple[Side, RowSet]] = [("gain", rows) for rows in load(evaluation.gain, "gain")]
    sides += [("retention", rows) for rows in load(evaluation.retention, "retention")]
    refuse_overlap(
        {"train": train, "preserve": preserve, "evaluation": [rows for _, rows in sides]}
    )
    tokens = [tokenize(rows, loaded.tokenizer, append_eos=True) for rows in train]
    facts = [_facts("train", rows, done) for rows, done in zip(train, tokens, strict=True)]
    facts += [_facts("preserve", rows, tokenize(rows, loaded.tokenizer)) for rows in preserve]
    items = [*evaluation.gain, *evaluation.retention]
    for item, (side, rows) in zip(items, sides, strict=True):
        of_item = tokenize(rows, loaded.tokenizer, append_eos=side == "gain")
        check_item(LoadedItem(side, item, rows, of_item))
        facts.append(_facts(item.name, rows, of_item))
    train_rows, validation_rows = hold_out(
        [row for part in tokens for row in part], recipe.training.validation_rows, recipe.seed
    )
    return Prepared(train, preserve, train_rows, validation_rows, facts, _notes(facts, train_rows))


def hold_out(
    rows: Sequence[TokenRow], count: int, seed: int
) -> tuple[list[TokenRow], list[TokenRow]]:
    """Split off `count` rows, drawn with `seed`; copies of a drawn row go with it.

    Returns:
        Rows to train on, and rows held out, both in their order.

    Raises:
        DataError: Nothing would be left to train on.
    """
    drawn = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    chosen = {rows[index].input_ids for index in drawn}
    kept = [row for row in rows if row.input_ids not in chosen]
    if not kept:
        raise DataError(
            f"training.validation_rows: expected fewer than the {len(rows)} train rows, got "
            f"{count}; lower it"
        )
    return kept, [rows[index] for index in sorted(drawn)]


def _facts(role: str, rows: RowSet, tokens: Sequence[TokenRow]) -> DataFacts:
    return DataFacts(
        role=role,
        source=rows.spec.label,
        fingerprint=rows.fingerprint,
        rows=len(tokens),
        tokens=sum(len(row.input_ids) for row in tokens),
        truncated_rows=count_truncated(tokens),
    )


def _notes(facts: Sequence[DataFacts], train_rows: Sequence[TokenRow]) -> list[str]:
    notes = [
        f"{fact.role} data {fact.source}: {fact.truncated_rows} of {fact.rows} rows are longer "
        "than max_length and truncated"
        for fact in facts
        if fact.truncated_rows
    ]
    empty = len(train_rows) - len(learnable(train_rows))
    if empty:
        notes.append(
            f"train data: {empty} of {len(train_rows)} rows have no completion token left and "
            "teach nothing; raise max_length"
        )
    return notes
