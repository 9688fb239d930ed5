"""All metrics of one evaluation item: base, tuned model, and the change paired by row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from forgetless.data.rows import Row, RowSet
from forgetless.data.tokens import TokenRow
from forgetless.errors import AdapterError, DataError, ForgetlessWarning
from forgetless.evaluation.answers import check_answers, judge
from forgetless.evaluation.base_cache import BaseCache
from forgetless.evaluation.generation import end_token_ids, generate_greedy
from forgetless.evaluation.instructions import parse_constraint
from forgetless.evaluation.items import GENERATED, EvaluationItem
from forgetless.evaluation.likelihood import RowScores, compare_rows, score_rows
from forgetless.evaluation.pairing import Measured, divergence, paired
from forgetless.evaluation.results import ItemResult, Sample, Side
from forgetless.models.targets import base_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedItem:
    """An evaluation item with its rows, as text and as tokens."""

    side: Side
    item: EvaluationItem
    rows: RowSet
    tokens: list[TokenRow]

    @property
    def prompted(self) -> list[int]:
        """Rows that have a prompt to generate from."""
        return [i for i, row in enumerate(self.tokens) if row.prompt_length > 0]

    @property
    def generates(self) -> bool:
        """Whether a metric needs generated text of every row."""
        return bool(GENERATED & set(self.item.metrics))


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
    if loaded.generates and len(loaded.prompted) < len(loaded.tokens):
        metrics = sorted(GENERATED & set(loaded.item.metrics))
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


class _Watch:
    """Counts finished rows of one stage for the caller's progress callback."""

    def __init__(self, progress: Progress | None, stage: str, total: int) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._done = 0
        self(0)

    def __call__(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._stage, self._done, self._total)


def measure_item(
    model: PeftModel,
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
        AdapterError: A likelihood that is NaN or infinite.
    """
    found: dict[str, Measured] = {}
    if {"nll", "kl", "greedy_match"} & set(loaded.item.metrics):
        found |= _likelihood_metrics(model, tokenizer, loaded, cache, progress)
    shown: tuple[Sample, ...] = ()
    index = loaded.prompted if loaded.generates else loaded.prompted[:samples]
    if index:
        base, tuned = _generations(model, tokenizer, loaded, index, cache, progress)
        if loaded.generates:
            found |= _judged_metrics(loaded, base, tuned)
        right = _right(loaded, found)
        telling = sorted(range(len(index)), key=lambda k: base[k].strip() == tuned[k].strip())
        shown = tuple(
            _sample(loaded.rows.rows[index[k]], base[k], tuned[k], right(k))
            for k in sorted(telling[:samples])
        )
    return ItemResult(
        name=loaded.item.name,
        side=loaded.side,
        rows=len(loaded.tokens),
        truncated_rows=sum(row.truncated for row in loaded.tokens),
        metrics={metric: found[metric].result for metric in loaded.item.metrics},
        samples=shown,
        row_values={metric: found[metric].by_row for metric in loaded.item.metrics},
    )


def _likelihood_metrics(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedItem,
    cache: BaseCache,
    progress: Progress | None,
) -> dict[str, Measured]:
    rows, size, name = loaded.tokens, loaded.item.batch_size, loaded.item.name
    kl_sum: NDArray[np.float64] | None = None
    if "kl" in loaded.item.metrics:
        watch = _Watch(progress, f"{name}: KL", len(rows))
        base, tuned, kl_sum = compare_rows(model, tokenizer, rows, batch_size=size, progress=watch)
    else:
        watch = _Watch(progress, f"{name}: NLL", len(rows))
        tuned = score_rows(model, tokenizer, rows, batch_size=size, progress=watch)

        def score_base() -> RowScores:
            watch = _Watch(progress, f"{name}: NLL of the base", len(rows))
            with model.disable_adapter():
                scores = score_rows(model, tokenizer, rows, batch_size=size, progress=watch)
            _check_finite(scores, name, "base model")
            return scores

        base = cache.scores(rows, score_base)
    _check_finite(base, name, "base model")
    _check_finite(tuned, name, "tuned model")
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


def _check_finite(scores: RowScores, name: str, which: str) -> None:
    bad = np.flatnonzero(~np.isfinite(scores.nll_sum))
    if len(bad):
        remedy = (
            "load it in float32 or bfloat16"
            if which == "base model"
            else "the adapter has diverged; train with a lower learning rate"
        )
        raise AdapterError(
            f"evaluation item `{name}`: expected a finite NLL from the {which}, got "
            f"{scores.nll_sum[bad[0]]} at row {bad[0]}; {remedy}"
        )


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


def _generations(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedItem,
    index: Sequence[int],
    cache: BaseCache,
    progress: Progress | None,
) -> tuple[list[str], list[str]]:
    """What base and tuned model generate for the rows `index`."""
    item = loaded.item
    prompts = [loaded.tokens[i].input_ids[: loaded.tokens[i].prompt_length] for i in index]

    def generate(stage: str) -> list[str]:
        return generate_greedy(
            model,
            tokenizer,
            prompts,
            max_new_tokens=item.max_new_tokens,
            batch_size=item.batch_size,
            progress=_Watch(progress, f"{item.name}: {stage}", len(prompts)),
        )

    def generate_base() -> list[str]:
        with model.disable_adapter():
            return generate("generation by the base")

    eos_ids = end_token_ids(base_of(model), tokenizer)
    base = cache.texts(prompts, item.max_new_tokens, eos_ids, generate_base)
    return base, generate("generation")


def _judged_metrics(
    loaded: LoadedItem, base: Sequence[str], tuned: Sequence[str]
) -> dict[str, Measured]:
    def figures(metric: str, texts: Sequence[str]) -> NDArray[np.float64]:
        return np.array(
            [
                judge(
                    metric, text, accepted_answers(row), prompt=row.prompt, templated=row.templated
                )
                for text, row in zip(texts, loaded.rows.rows, strict=True)
            ]
        )

    return {
        metric: paired(metric, figures(metric, base), figures(metric, tuned))
        for metric in loaded.item.metrics
        if metric in GENERATED
    }


def _right(
    loaded: LoadedItem, found: dict[str, Measured]
) -> Callable[[int], tuple[bool | None, bool | None]]:
    """Whether base and tuned model answer a row rightly, by the item's first metric of answers."""
    judging = [m for m in loaded.item.metrics if m in GENERATED - {"refusal", "f1"}]
    if not judging:
        return lambda _: (None, None)
    rows = found[judging[0]].by_row
    return lambda k: (rows.base[k] == 1.0, rows.tuned[k] == 1.0)


def _sample(row: Row, base: str, tuned: str, right: tuple[bool | None, bool | None]) -> Sample:
    return Sample(
        prompt=row.prompt,
        reference=accepted_answers(row)[0],
        base=base,
        tuned=tuned,
        base_right=right[0],
        tuned_right=right[1],
    )
