"""An evaluation item with its rows, checked before anything is measured on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from forgetless.data.rows import Row, RowSet
from forgetless.data.tokens import TokenRow
from forgetless.errors import DataError
from forgetless.evaluation.answers import check_answers
from forgetless.evaluation.instructions import parse_constraint
from forgetless.evaluation.items import GENERATED, REFUSAL_ODDS, EvaluationItem
from forgetless.evaluation.judges import Judge
from forgetless.evaluation.results import Side

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedItem:
    """An evaluation item with its rows, as text and as tokens, and who else judges its answers."""

    side: Side
    item: EvaluationItem
    rows: RowSet
    tokens: list[TokenRow]
    judges: Mapping[str, Judge] = field(default_factory=dict)

    @property
    def prompted(self) -> list[int]:
        """Rows that have a prompt to generate from."""
        return [i for i, row in enumerate(self.tokens) if row.prompt_length > 0]

    @property
    def generates(self) -> bool:
        """Whether a metric needs generated text of every row."""
        return bool(GENERATED & set(self.item.metrics))

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of all that is measured on it: its metrics, then judges where it generates."""
        return (*self.item.metrics, *(self.judges if self.generates else ()))


def check_item(loaded: LoadedItem) -> None:
    """Refuse, before any forward pass, an item that its metrics cannot be measured on.

    Raises:
        DataError: No rows, a generating metric on rows without a prompt, or unusable answers.
    """
    where = f"evaluation item `{loaded.item.name}`"
    if not loaded.tokens:
        raise DataError(
            f"{where}: expected at least one row, got none; check its path, rows and limit"
        )
    metrics = sorted((GENERATED | REFUSAL_ODDS) & set(loaded.item.metrics))
    if metrics and len(loaded.prompted) < len(loaded.tokens):
        raise DataError(
            f"{where}: expected rows with a prompt for {', '.join(metrics)}, got plain text; "
            f"give prompt and completion, or messages"
        )
    for index, row in enumerate(loaded.rows.rows):
        for metric in loaded.item.metrics:
            if metric == "instruction":
                for constraint in accepted_answers(row):
                    parse_constraint(constraint)
            if metric in GENERATED:
                check_answers(metric, accepted_answers(row), f"{where}, row {index}")


def accepted_answers(row: Row) -> tuple[str, ...]:
    """The row's accepted answers; its completion where it names none."""
    return row.answers or (row.completion.strip(),)


class Watch:
    """Counts finished rows of one stage for the caller's progress callback."""

    def __init__(self, progress: Progress | None, stage: str, total: int) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._done = 0
        self(0)

    def __call__(self, rows: int) -> None:
        """Take note of `rows` more."""
        self._done += rows
        if self._progress is not None:
            self._progress(self._stage, self._done, self._total)
