"""Tasks of EleutherAI's lm-eval on the live model and on its base, as evaluation items.

`lm_eval.evaluate` and not `simple_evaluate`: that one asks the hub about the model and lists the
machine's packages, and sets seeds, which is done here. The figures are the same (tested).
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedTokenizerBase

from forgetless.errors import ForgetlessWarning, RecipeError
from forgetless.escaping import one_line
from forgetless.evaluation.base_cache import BaseCache, TaskFigures
from forgetless.evaluation.lm_eval.cache_key import is_known, key
from forgetless.evaluation.lm_eval.metrics import measured_metric
from forgetless.evaluation.lm_eval.passes import TaskPass, run_task
from forgetless.evaluation.lm_eval.spec import LmEvalRecipe
from forgetless.evaluation.lm_eval.tasks import OpenTask
from forgetless.evaluation.loaded import Progress
from forgetless.evaluation.pairing import Measured
from forgetless.evaluation.results import ItemResult, Sample, TaskFacts
from forgetless.models.pair import TunedModel
from forgetless.models.targets import base_of

_NOT_OF_THE_TASK = frozenset({"metadata", "task_alias", "tag"})
_LONGEST = 2000  # characters of a template in the record; some are Python source


def measure_task(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenTask,
    settings: LmEvalRecipe,
    *,
    cache: BaseCache,
    progress: Progress | None = None,
) -> ItemResult:
    """Run one task with the adapter and without, on the same rows and prompts.

    Args:
        model: The tuned model, in eval mode.
        tokenizer: Its tokenizer.
        opened: The task.
        settings: Batch size, and how many samples to keep.
        cache: The base's figures.
        progress: Called with stage, requests done and requests in all.

    Raises:
        RecipeError: The task gives no number to compare, or other prompts the second time.
    """
    # Before lm-eval's bars are sent into a sink.
    stderr = sys.stderr

    def run(stage: str) -> TaskPass:
        return run_task(
            model,
            tokenizer,
            opened,
            batch_size=settings.batch_size,
            stage=f"{opened.label}: {stage}",
            stderr=stderr,
            progress=progress,
        )

    tuned = run("lm-eval")

    def run_base() -> TaskFigures:
        with model.disable_adapter():
            base = run("lm-eval on the base")
        if base.rows != tuned.rows:
            raise RecipeError(
                f"lm_eval task {opened.label}: expected the same prompts for base and tuned model, "
                "got others the second time, as the task draws them; it cannot be compared"
            )
        return TaskFigures(values=base.values, answers=base.answers)

    facts = _facts(opened, tuned.rows)
    if is_known(opened):
        named = key(facts, settings, base_of(model), tokenizer)
        base = cache.task(named, len(tuned.prompts), run_base)
    else:
        base = run_base()
    found, filters = _metrics(opened, base, tuned)
    return ItemResult(
        name=opened.label,
        side=opened.wanted.side,
        rows=len(tuned.prompts),
        truncated_rows=0,
        metrics={name: one.result for name, one in found.items()},
        samples=_samples(tuned, base, settings.samples),
        row_values={name: one.by_row for name, one in found.items() if one.by_row.tuned},
        lm_eval=facts.model_copy(update={"filters": filters}),
    )


def _metrics(
    opened: OpenTask, base: TaskFigures, tuned: TaskPass
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Metrics by the name that tables give them, and the filter behind each."""
    part = opened.parts[0]
    columns = [column for column in tuned.values if column in base.values]
    several = len({column.rpartition(",")[2] for column in columns}) > 1
    found: dict[str, Measured] = {}
    filters: dict[str, str] = {}
    for column in columns:
        metric, _, chosen = column.rpartition(",")
        aggregate: Callable[[list[Any]], Any] = part.aggregation().get(metric, _mean)
        one = measured_metric(
            column if several else metric,
            base.values[column],
            tuned.values[column],
            aggregate,
            higher_is_better=bool(part.higher_is_better().get(metric, True)),
        )
        if one is None:
            warnings.warn(
                f"lm_eval task {one_line(opened.label)}: {one_line(metric)} is not one finite "
                "number for base and tuned model; it is left out",
                ForgetlessWarning,
                stacklevel=4,
            )
            continue
        found[one.result.metric] = one
        filters[one.result.metric] = chosen
    if not found:
        raise RecipeError(
            f"lm_eval task {opened.label}: expected a metric that is a number, got none; leave the "
            "task out"
        )
    return found, filters


def _mean(values: list[Any]) -> float:
    return float(sum(values) / len(values))


def _facts(opened: OpenTask, rows: str) -> TaskFacts:
    """What was asked and how, for the record: the template alone moves a score by points."""
    configs = [part.dump_config() for part in opened.parts]
    first = configs[0]
    kept = [{k: v for k, v in c.items() if k not in _NOT_OF_THE_TASK} for c in configs]
    for config in kept:
        # Where the data lie is not what they are; `rows` says that.
        config.pop("dataset_kwargs", None)
    text = json.dumps([kept, opened.wanted.chat_template], sort_keys=True, default=str)
    return TaskFacts(
        task=opened.wanted.task if len(opened.parts) > 1 else opened.parts[0].task_name,
        version=opened.version,
        lm_eval=version("lm_eval"),
        config_hash=hashlib.sha256(text.encode()).hexdigest()[:16],
        rows_hash=rows,
        num_fewshot=int(first.get("num_fewshot") or 0),
        limit=opened.wanted.limit,
        chat_template=opened.wanted.chat_template,
        description=_shortened(first.get("description")),
        doc_to_text=_shortened(first.get("doc_to_text")),
        doc_to_target=_shortened(first.get("doc_to_target")),
        generation=_shortened(first.get("generation_kwargs")),
    )


def _shortened(value: object) -> str:
    text = (
        "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    )
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _samples(tuned: TaskPass, base: TaskFigures, count: int) -> tuple[Sample, ...]:
    """The first rows on which base and tuned model say something else, then others."""
    told = [i for i in range(len(tuned.answers)) if tuned.answers[i] or base.answers[i]]
    told.sort(key=lambda i: tuned.answers[i] == base.answers[i])
    return tuple(
        Sample(
            prompt=tuned.prompts[i],
            reference=tuned.targets[i],
            base=base.answers[i],
            tuned=tuned.answers[i],
        )
        for i in sorted(told[:count])
    )
