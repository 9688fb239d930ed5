"""Likelihoods of rows under base and tuned model, refused where they are no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from forgetless.data.tokens import TokenRow
from forgetless.errors import AdapterError
from forgetless.evaluation.base_cache import BaseCache
from forgetless.evaluation.items import EvaluationItem
from forgetless.evaluation.likelihood import RowScores, score_rows
from forgetless.evaluation.loaded import Progress, Watch
from forgetless.models.pair import TunedModel


def base_scores(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    item: EvaluationItem,
    figure: str,
    *,
    cache: BaseCache,
    progress: Progress | None = None,
) -> RowScores:
    """Rows under the base, from the cache where it has them.

    Raises:
        AdapterError: A likelihood that is NaN or infinite.
    """

    def compute() -> RowScores:
        watch = Watch(progress, f"{item.name}: {figure} of the base", len(rows))
        with model.disable_adapter():
            scores = score_rows(model, tokenizer, rows, batch_size=item.batch_size, progress=watch)
        check_finite(scores.nll_sum, figure, item.name, "base model")
        return scores

    return cache.scores(rows, compute)


def tuned_scores(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    item: EvaluationItem,
    figure: str,
    *,
    progress: Progress | None = None,
) -> RowScores:
    """Rows under the tuned model.

    Raises:
        AdapterError: A likelihood that is NaN or infinite.
    """
    watch = Watch(progress, f"{item.name}: {figure}", len(rows))
    scores = score_rows(model, tokenizer, rows, batch_size=item.batch_size, progress=watch)
    check_finite(scores.nll_sum, figure, item.name, "tuned model")
    return scores


def check_finite(by_row: NDArray[np.float64], figure: str, name: str, which: str) -> None:
    """Check one model's figures of one item: a mean would hide them, a record read as missing.

    Args:
        by_row: The figures.
        figure: What they are.
        name: The item's name.
        which: `base model` or `tuned model`.

    Raises:
        AdapterError: A figure that is NaN or infinite, with its row.
    """
    bad = np.flatnonzero(~np.isfinite(by_row))
    if len(bad):
        remedy = (
            "load it in float32 or bfloat16"
            if which == "base model"
            else "what was tuned has diverged; train with a lower learning rate"
        )
        raise AdapterError(
            f"evaluation item `{name}`: expected a finite {figure} from the {which}, got "
            f"{by_row[bad[0]]} at row {bad[0]}; {remedy}"
        )
