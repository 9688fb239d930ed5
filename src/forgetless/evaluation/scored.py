"""Likelihoods of rows under base and tuned model, refused where they are no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores rows of one item.

    Attributes:
        model: The tuned model, in eval mode.
        tokenizer: Its tokenizer.
        item: Its name stands in messages; its `batch_size` is taken.
        cache: The base's figures.
        progress: Called with stage, rows done and rows in all.
        own_position: Whether a token is held against the logits of its own position, as in `board`.
    """

    model: TunedModel
    tokenizer: PreTrainedTokenizerBase
    item: EvaluationItem
    cache: BaseCache
    progress: Progress | None
    own_position: bool = False

    def base(self, rows: Sequence[TokenRow], figure: str) -> RowScores:
        """Rows under the base, from the cache where it has them.

        Args:
            rows: Tokenised rows.
            figure: What they are scored for, for progress and messages.

        Raises:
            AdapterError: A likelihood that is NaN or infinite.
        """

        def compute() -> RowScores:
            with self.model.disable_adapter():
                return self._score(rows, f"{figure} of the base", figure, "base model")

        kind = "own-position" if self.own_position else "scores"
        return self.cache.scores(rows, compute, kind=kind)

    def tuned(self, rows: Sequence[TokenRow], figure: str) -> RowScores:
        """The same under the tuned model."""
        return self._score(rows, figure, figure, "tuned model")

    def _score(self, rows: Sequence[TokenRow], stage: str, figure: str, which: str) -> RowScores:
        name, size = self.item.name, self.item.batch_size
        watch = Watch(self.progress, f"{name}: {stage}", len(rows))
        scores = score_rows(
            self.model,
            self.tokenizer,
            rows,
            batch_size=size,
            own_position=self.own_position,
            progress=watch,
        )
        check_finite(scores.nll_sum, figure, name, which)
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
