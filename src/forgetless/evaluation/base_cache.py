"""The base model's own figures, kept on disk: one small file for each model and set of tokens.

A sweep evaluates many adapters of one base on the same rows; the base's part is the same each time.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from forgetless.atomic import write_atomically
from forgetless.data.tokens import TokenRow
from forgetless.errors import ForgetlessWarning
from forgetless.evaluation.base_states import BaseStates
from forgetless.evaluation.generation import Generated
from forgetless.evaluation.likelihood import RowScores
from forgetless.models.cache import made_by_one


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1

    def lengths(self) -> set[int]:
        """Lengths of the lists: one entry a row."""
        raise NotImplementedError


class _Scores(_Figures):
    nll_sum: list[FiniteFloat]
    num_tokens: list[int]
    greedy_match: list[bool]

    def lengths(self) -> set[int]:
        return {len(self.nll_sum), len(self.num_tokens), len(self.greedy_match)}


class _Generated(_Figures):
    texts: list[str]
    hit_limit: list[bool]

    def lengths(self) -> set[int]:
        return {len(self.texts), len(self.hit_limit)}


class TaskFigures(_Figures):
    """The base's figures of one task of lm-eval: of each row, by metric, and what it answered."""

    values: dict[str, list[Any]]
    answers: list[str]

    def lengths(self) -> set[int]:
        """Lengths of the lists: one entry a row."""
        return {len(self.answers), *map(len, self.values.values())}


_Kind = TypeVar("_Kind", bound=_Figures)


class BaseCache:
    """Figures of one base model, in one folder; without one everything is computed each time."""

    def __init__(self, folder: Path | None, context: Sequence[str]) -> None:
        """Take a folder and what every figure depends on besides the tokens.

        Args:
            folder: Where the files are; made when needed. None: no cache.
            context: Model fingerprint, device type and the like.
        """
        self._folder = folder
        self._context = tuple(context)

    def scores(
        self, rows: Sequence[TokenRow], compute: Callable[[], RowScores], *, kind: str = "scores"
    ) -> RowScores:
        """Likelihood figures of `rows`, from the file or from `compute`; `kind` says which ones."""
        path = self._path(kind, [], [(row.input_ids, row.prompt_length) for row in rows])

        def make() -> _Scores:
            scores = compute()
            return _Scores(
                nll_sum=scores.nll_sum.tolist(),
                num_tokens=scores.num_tokens.tolist(),
                greedy_match=scores.greedy_match.tolist(),
            )

        found = _kept(path, _Scores, len(rows), make)
        return RowScores(
            np.array(found.nll_sum, np.float64),
            np.array(found.num_tokens, np.int64),
            np.array(found.greedy_match, bool),
        )

    def states(self, rows: Sequence[TokenRow], batch_size: int) -> BaseStates:
        """Hidden states of `rows` in batches of that size."""
        tokens = [(row.input_ids, row.prompt_length) for row in rows]
        path = self._path("states", [str(batch_size)], tokens)
        return BaseStates(None if path is None else path.with_suffix(".safetensors"))

    def generated(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_ids: Sequence[int],
        compute: Callable[[], Generated],
    ) -> Generated:
        """Greedy generations for `prompts`, from the file or from `compute`."""
        settings = [str(max_new_tokens), str(list(eos_ids))]
        path = self._path("generated", settings, [(tuple(p), len(p)) for p in prompts])

        def make() -> _Generated:
            generated = compute()
            return _Generated(texts=generated.texts, hit_limit=generated.hit_limit)

        found = _kept(path, _Generated, len(prompts), make)
        return Generated(found.texts, found.hit_limit)

    def task(
        self, settings: Sequence[str], rows: int, compute: Callable[[], TaskFigures]
    ) -> TaskFigures:
        """Figures of a task of lm-eval, whose rows are in `settings` as a hash."""
        path = self._path("task", settings, [])
        return _kept(path, TaskFigures, rows, compute, can_be_kept=_reads_as_written)

    def _path(
        self, kind: str, settings: Sequence[str], rows: Sequence[tuple[tuple[int, ...], int]]
    ) -> Path | None:
        if self._folder is None:
            return None
        state = hashlib.sha256(json.dumps([kind, *self._context, *settings]).encode())
        for ids, prompt_length in rows:
            state.update(f"\0{prompt_length} {','.join(map(str, ids))}".encode())
        return self._folder / f"base-{kind}-{state.hexdigest()[:24]}.json"


def _kept(
    path: Path | None,
    kind: type[_Kind],
    rows: int,
    compute: Callable[[], _Kind],
    *,
    can_be_kept: Callable[[_Kind], bool] = lambda figures: True,
) -> _Kind:
    """From the file, or computed and stored: of several processes by one, the others wait."""
    there = path is not None and path.exists()
    found = _load(path, kind, rows)
    if found is not None:
        return found
    with made_by_one(path):
        if not there:
            found = _load(path, kind, rows)
        if found is None:
            found = compute()
            if can_be_kept(found):
                _store(path, found)
    return found


def _load(path: Path | None, kind: type[_Kind], rows: int) -> _Kind | None:
    if path is None or not path.exists():
        return None
    try:
        figures = kind.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        problem = str(error).splitlines()[0]
    else:
        if figures.lengths() == {rows}:
            return figures
        problem = f"holds {sorted(figures.lengths())} rows, not {rows}"
    warnings.warn(
        f"base cache: {path} cannot be used ({problem}); the base's figures are computed again",
        ForgetlessWarning,
        stacklevel=5,
    )
    return None


def _reads_as_written(figures: TaskFigures) -> bool:
    """Whether JSON holds them: a figure that is infinite, or an object, would come back as another.

    A metric of lm-eval may have any object for a row.
    """
    try:
        return bool(json.loads(figures.model_dump_json()) == figures.model_dump())
    except (ValueError, TypeError):  # cannot be written, or not be compared
        return False


def _store(path: Path | None, figures: _Figures) -> None:
    if path is None:
        return
    try:
        write_atomically(path, figures.model_dump_json())
    except OSError as error:
        # The figures are at hand: a full disk must not cost the evaluation.
        warnings.warn(
            f"base cache: {path} cannot be written ({error}); "
            "the next evaluation computes the base again",
            ForgetlessWarning,
            stacklevel=5,
        )
