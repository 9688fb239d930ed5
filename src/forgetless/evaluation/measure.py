"""All metrics of one evaluation item: base, tuned model, and the change paired by row."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from forgetless.errors import DataError, ForgetlessWarning
from forgetless.evaluation.base_cache import BaseCache
from forgetless.evaluation.board import board_loss
from forgetless.evaluation.items import REFUSAL_ODDS
from forgetless.evaluation.judged import judged
from forgetless.evaluation.likelihood import RowScores, compare_rows
from forgetless.evaluation.loaded import LoadedItem, Progress, Watch
from forgetless.evaluation.pairing import Measured, divergence, paired
from forgetless.evaluation.refusal_odds import refusal_odds
from forgetless.evaluation.results import ItemResult
from forgetless.evaluation.scored import Scorer, check_finite
from forgetless.models.pair import TunedModel


def measure_item(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedItem,
    *,
    samples: int,
    cache: BaseCache,
    progress: Progress | None = None,
) -> ItemResult:
    """Measure one item.

    Args:
        model: The tuned model, in eval mode.
        tokenizer: Its tokenizer.
        loaded: The item, checked by `check_item`.
        samples: How many rows to show generations of; the first where base and tuned model
            differ, of all rows where a metric generates.
        cache: The base's figures.
        progress: Called with stage, rows done and rows in all.

    Returns:
        Every metric of the item, in its order.

    Raises:
        AdapterError: NLL or KL of a row that is NaN or infinite.
    """
    found: dict[str, Measured] = {}
    if {"nll", "kl", "greedy_match"} & set(loaded.item.metrics):
        found |= _likelihood_metrics(model, tokenizer, loaded, cache, progress)
    if "board_loss" in loaded.item.metrics:
        found["board_loss"] = board_loss(model, tokenizer, loaded, cache=cache, progress=progress)
    if REFUSAL_ODDS & set(loaded.item.metrics):
        found |= refusal_odds(model, tokenizer, loaded, cache=cache, progress=progress)
    answers = judged(model, tokenizer, loaded, samples=samples, cache=cache, progress=progress)
    found |= answers.metrics
    return ItemResult(
        name=loaded.item.name,
        side=loaded.side,
        rows=len(loaded.tokens),
        truncated_rows=sum(row.truncated for row in loaded.tokens),
        metrics={metric: found[metric].result for metric in loaded.figures},
        samples=answers.samples,
        row_values={metric: found[metric].by_row for metric in loaded.figures},
        hit_limit=answers.hit_limit,
        samples_can_be_shared=loaded.item.samples_can_be_shared,
    )


def _likelihood_metrics(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedItem,
    cache: BaseCache,
    progress: Progress | None,
) -> dict[str, Measured]:
    rows, size, name = loaded.tokens, loaded.item.batch_size, loaded.item.name
    kl_sum: NDArray[np.float64] | None = None
    if "kl" in loaded.item.metrics:
        watch = Watch(progress, f"{name}: KL", len(rows))
        with cache.states(rows, size) as states:
            base, tuned, kl_sum = compare_rows(
                model, tokenizer, rows, batch_size=size, states=states, progress=watch
            )
        check_finite(base.nll_sum, "NLL", name, "base model")
        check_finite(tuned.nll_sum, "NLL", name, "tuned model")
        check_finite(kl_sum, "KL", name, "tuned model")
    else:
        scorer = Scorer(model, tokenizer, loaded.item, cache, progress)
        tuned, base = scorer.tuned(rows, "NLL"), scorer.base(rows, "NLL")
    kept = _scored_rows(tuned, name)
    tokens = tuned.num_tokens[kept].astype(np.float64)
    results = {
        "nll": paired("nll", base.nll_sum[kept] / tokens, tuned.nll_sum[kept] / tokens, tokens),
        "greedy_match": paired(
            "greedy_match",
            base.greedy_match[kept].astype(float),
            tuned.greedy_match[kept].astype(float),
        ),
    }
    if kl_sum is not None:
        results["kl"] = divergence(kl_sum[kept] / tokens, tokens)
    return results


def _scored_rows(scores: RowScores, name: str) -> NDArray[np.int64]:
    kept = np.flatnonzero(scores.num_tokens > 0)
    missing = len(scores.num_tokens) - len(kept)
    if not len(kept):
        raise DataError(
            f"evaluation item `{name}`: expected tokens to score, got none in {missing} rows; "
            f"raise max_length so that completions are not cut off"
        )
    if missing:
        warnings.warn(
            f"evaluation item `{name}`: {missing} of {len(scores.num_tokens)} rows have no token "
            "to score (cut off by max_length, or empty); likelihood metrics leave them out",
            ForgetlessWarning,
            stacklevel=2,
        )
    return kept
