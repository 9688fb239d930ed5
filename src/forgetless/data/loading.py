"""One call from a data spec to its rendered rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.data.rendering import read_fields, render
from forgetless.data.rows import Row, RowSet
from forgetless.data.self_sampling import sample_self
from forgetless.data.sources import Placed, choose, read_records
from forgetless.data.spec import DataSpec
from forgetless.data.templates import fill
from forgetless.errors import DataError, ForgetlessWarning

SELF_ROWS = 64  # rows of `self` where neither `limit` nor `rows` says how many


def load_rows(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: PreTrainedModel | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    needs_completion: bool = False,
) -> RowSet:
    """Read and render a spec's rows; rows of blank text are left out, with a warning.

    Args:
        spec: Where the rows come from and how they become text.
        tokenizer: Renders chat messages.
        model: Sampled for `self`; a `PeftModel` is sampled without its adapter.
        cache: Folder that keeps `self` samples.
        progress: Told rows done and rows in all while `self` is sampled.
        needs_completion: Leave rows with a blank completion out too: only to stop would be learned.

    Raises:
        DataError: The source cannot be read or rendered, or holds no text.
    """
    if spec.self_sampled:
        return RowSet(spec, _self_rows(spec, tokenizer, model, cache, progress))
    found = [
        replace(
            render(placed.record, spec, tokenizer, placed.where), further=_further(placed, spec)
        )
        for placed in read_records(spec)
    ]
    rows, left_out = _sort_out(found, spec, needs_completion=needs_completion)
    for words in left_out:
        warnings.warn(f"{spec.label}: {words} left out", ForgetlessWarning, stacklevel=2)
    return RowSet(spec, rows)


def check_rows(spec: DataSpec, *, needs_completion: bool = False) -> RowSet:
    """Read a spec's rows as far as that takes no model; every field of every row is looked up.

    Returns:
        The rows that need no chat template, as `load_rows` gives them; none of `self` or the hub.

    Raises:
        DataError: The source cannot be read or rendered, or holds no text.
    """
    if spec.self_sampled or spec.hub is not None:
        return RowSet(spec, ())
    found = []
    for placed in read_records(spec):
        found.append(read_fields(placed.record, spec, placed.where))
        _further(placed, spec)
    plain = [row for row in found if isinstance(row, Row)]
    if not plain:
        return RowSet(spec, ())
    if len(plain) < len(found):
        return RowSet(spec, tuple(row for row in plain if row.text.strip()))
    return RowSet(spec, _sort_out(plain, spec, needs_completion=needs_completion)[0])


def _further(placed: Placed, spec: DataSpec) -> tuple[str, ...]:
    return tuple(fill(template, placed.record, placed.where) for template in spec.further)


def _sort_out(
    rows: Sequence[Row], spec: DataSpec, *, needs_completion: bool
) -> tuple[tuple[Row, ...], list[str]]:
    """The rows to take, and what is left out in words, such as `3 blank rows are`."""
    with_text = [row for row in rows if row.text.strip()]
    blank = len(rows) - len(with_text)
    if not with_text:
        raise DataError(f"{spec.label}: expected rows with text, got {blank} blank rows")
    taken = [row for row in with_text if row.has_completion or not needs_completion]
    empty = len(with_text) - len(taken)
    if not taken:
        raise DataError(
            f"{spec.label}: expected rows with a completion, got {empty} rows with a blank one; "
            "fill the column, or name another one in the template"
        )
    counts = {"blank row": blank, "row with a blank completion": empty}
    left_out = [
        f"1 {kind} is" if count == 1 else f"{count} {kind.replace('row', 'rows', 1)} are"
        for kind, count in counts.items()
        if count
    ]
    return tuple(taken), left_out


def rows_to_sample(spec: DataSpec) -> int:
    """How many rows `load_rows` has the model write, the slow part; 0 where it only reads."""
    if not spec.self_sampled:
        return 0
    return spec.rows[1] if spec.rows else spec.limit or SELF_ROWS


def _self_rows(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None,
    cache: Path | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Row, ...]:
    if model is None:
        raise DataError("self: expected a model to sample from, got none; give the base model")
    wanted = rows_to_sample(spec)
    sampled = sample_self(
        model,
        tokenizer,
        rows=wanted,
        max_length=spec.max_length,
        seed=spec.seed,
        cache=cache,
        progress=progress,
    )
    return tuple(sampled[index] for index in choose(range(wanted), spec))
