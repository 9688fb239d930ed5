"""The data of a run: rendered, checked against each other, split and tokenised."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forgetless.data.loading import load_rows
from forgetless.data.overlap import refuse_overlap
from forgetless.data.rows import RowSet
from forgetless.data.spec import DataSpec
from forgetless.data.tokens import TokenRow, count_truncated, has_target, tokenize
from forgetless.errors import DataError
from forgetless.evaluation.items import EvaluationItem
from forgetless.evaluation.loaded import LoadedItem, check_item
from forgetless.experiments.record import DataFacts
from forgetless.methods.base import AnyMethod
from forgetless.models.load import LoadedModel
from forgetless.recipe import Recipe
from forgetless.training.options import TrainingOptions
from forgetless.training.regularisers import make_regularisers
from forgetless.training.sft import learnable

_Role = Literal["train", "preserve", "gain", "retention"]


@dataclass(frozen=True)
class Prepared:
    """All rows of a run.

    Attributes:
        train: Row sets to learn; what the method calibrates on, where it needs train data.
        preserve: Row sets to keep.
        train_rows: Tokens to train on, without the validation rows.
        preserve_rows: Tokens to keep, as they are.
        validation_rows: Tokens held out of the train data.
        facts: For the record, by role and source.
        notes: What a user wants to know: how much was truncated or left out.
    """

    train: list[RowSet]
    preserve: list[RowSet]
    train_rows: list[TokenRow]
    preserve_rows: list[TokenRow]
    validation_rows: list[TokenRow]
    facts: list[DataFacts]
    notes: list[str]


def prepare(
    recipe: Recipe,
    loaded: LoadedModel,
    *,
    cache: Path,
    advance: Callable[[int, int, str], None],
    note: Callable[[str], None],
) -> Prepared:
    """Load every row that the recipe names, and refuse what would spoil a figure.

    `advance` hears how far sampling is, `note` that it begins.

    Raises:
        DataError: Rows in two roles, an item that its metrics cannot measure, too few train rows.
        TrainingError: No train row has a completion.
    """
    wanted: list[tuple[_Role, DataSpec]] = [
        *(("train", spec) for spec in recipe.train_data),
        *(("preserve", spec) for spec in recipe.preserve_data),
        *(("gain", spec) for spec in recipe.evaluation.gain),
        *(("retention", spec) for spec in recipe.evaluation.retention),
    ]

    def load(role: _Role, spec: DataSpec) -> _Source:
        progress = _Sampling(role, spec, advance, note)
        rows = load_rows(
            spec,
            loaded.tokenizer,
            model=loaded.model,
            cache=cache,
            progress=progress,
            needs_completion=spec.needs_completion
            if isinstance(spec, EvaluationItem)
            else role == "train",
        )
        return _checked(role, spec, rows, loaded)

    # What costs nothing comes first: a mistake in it is seen before `self` is sampled.
    late = [spec.self_sampled and role != "train" for role, spec in wanted]
    found: dict[int, _Source] = {}
    held: tuple[list[TokenRow], list[TokenRow]] = ([], [])
    for is_late in (False, True):
        for place, (role, spec) in enumerate(wanted):
            if late[place] == is_late:
                found[place] = load(role, spec)
        sources = [found[place] for place in sorted(found)]
        refuse_overlap(_by_role(sources))
        train_tokens = [row for one in sources if one.role == "train" for row in one.tokens]
        held = hold_out(train_tokens, recipe.training.validation_rows, recipe.seed)
        learnable(held[0])
    facts = [_facts(source) for source in sources]
    roles = _by_role(sources)
    kept = [row for one in sources if one.role == "preserve" for row in one.tokens]
    return Prepared(
        train=roles["train"],
        preserve=roles["preserve"],
        train_rows=held[0],
        preserve_rows=kept,
        validation_rows=held[1],
        facts=facts,
        notes=_notes(facts, held[0]),
    )


@dataclass(frozen=True)
class _Source:
    role: _Role
    spec: DataSpec
    rows: RowSet
    tokens: list[TokenRow]


class _Sampling:
    """Passes on how far `self` sampling is; says first what is sampled, unless it was kept."""

    def __init__(
        self,
        role: _Role,
        spec: DataSpec,
        advance: Callable[[int, int, str], None],
        note: Callable[[str], None],
    ) -> None:
        self._role, self._spec, self._advance, self._note = role, spec, advance, note
        self._is_told = False

    def __call__(self, done: int, total: int) -> None:
        if not self._is_told:
            length = self._spec.max_length
            self._note(f"sampling {total} texts of up to {length} tokens from the model")
            self._is_told = True
        self._advance(done, total, self._role)


def _checked(role: _Role, spec: DataSpec, rows: RowSet, loaded: LoadedModel) -> _Source:
    """Rows with their tokens; an evaluation item that its metrics cannot measure is refused."""
    tokens = tokenize(rows, loaded.tokenizer, append_eos=role in ("train", "gain"))
    if isinstance(spec, EvaluationItem):
        check_item(LoadedItem("gain" if role == "gain" else "retention", spec, rows, tokens))
    return _Source(role, spec, rows, tokens)


def _by_role(sources: Sequence[_Source]) -> dict[str, list[RowSet]]:
    grouped: dict[str, list[RowSet]] = {"train": [], "preserve": [], "evaluation": []}
    for source in sources:
        role = source.role if source.role in grouped else "evaluation"
        grouped[role].append(source.rows)
    return grouped


def training_options(recipe: Recipe, method: AnyMethod) -> TrainingOptions:
    """The recipe's training part with the method's defaults for what it leaves open."""
    values = recipe.training.model_dump(exclude={"validation_rows", "regularisers"})
    rate, decay = values.pop("learning_rate"), values.pop("weight_decay")
    bf16 = values.pop("bf16")
    return TrainingOptions(
        learning_rate=method.default_learning_rate if rate is None else rate,
        learning_rate_source=method.learning_rate_source if rate is None else "given",
        weight_decay=method.default_weight_decay if decay is None else decay,
        # A dtype that was asked for is the dtype to train in; `auto` leaves it to the hardware.
        bf16=False if bf16 is None and recipe.dtype == "float32" else bf16,
        regularisers=make_regularisers(recipe.training.regularisers),
        **values,
    )


def hold_out(
    rows: Sequence[TokenRow], count: int, seed: int
) -> tuple[list[TokenRow], list[TokenRow]]:
    """Split off `count` rows that have a completion; copies of a drawn row go with it.

    Returns:
        Rows to train on, and rows held out, both in their order.

    Raises:
        DataError: Nothing would be left to train on.
    """
    with_target = [index for index, row in enumerate(rows) if has_target(row)]
    drawn = random.Random(seed).sample(with_target, min(count, len(with_target)))
    chosen = {rows[index].input_ids for index in drawn}
    kept = [row for row in rows if row.input_ids not in chosen]
    if not kept:
        raise DataError(
            f"training.validation_rows: expected fewer than the {len(rows)} train rows, got "
            f"{count}; lower it"
        )
    return kept, [rows[index] for index in sorted(drawn)]


def _facts(source: _Source) -> DataFacts:
    item = source.spec
    return DataFacts(
        role=item.name if isinstance(item, EvaluationItem) else source.role,
        source=source.spec.label,
        fingerprint=source.rows.fingerprint,
        rows=len(source.tokens),
        tokens=sum(len(row.input_ids) for row in source.tokens),
        truncated_rows=count_truncated(source.tokens),
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
