"""One call from a data spec to its rendered rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.data.rendering import render
from forgetless.data.rows import Row, RowSet
from forgetless.data.self_sampling import sample_self
from forgetless.data.sources import choose, read_records
from forgetless.data.spec import DataSpec
from forgetless.errors import DataError, ForgetlessWarning

SELF_ROWS = 64  # rows of `self` where neither `limit` nor `rows` says how many


def load_rows(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: PreTrainedModel | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RowSet:
    """Read and render a spec's rows; rows of blank text are left out, with a warning.

    Args:
        spec: Where the rows come from and how they become text.
        tokenizer: Renders chat messages.
        model: Sampled for `self`; a `PeftModel` is sampled without its adapter.
        cache: Folder that keeps `self` samples.
        progress: Told rows done and rows in all while `self` is sampled.

    Raises:
        DataError: The source cannot be read or rendered, or holds no text.
    """
    if spec.self_sampled:
        return RowSet(spec, _self_rows(spec, tokenizer, model, cache, progress))
    rows = []
    blank = 0
    for position, record in read_records(spec):
        row = render(record, spec, tokenizer, f"{spec.label}: row {position}")
        if row.text.strip():
            rows.append(row)
        else:
            blank += 1
    if not rows:
        raise DataError(f"{spec.label}: expected rows with text, got {blank} blank rows")
    if blank:
        warnings.warn(
            f"{spec.label}: {blank} blank rows are left out", ForgetlessWarning, stacklevel=2
        )
    return RowSet(spec, tuple(rows))


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
