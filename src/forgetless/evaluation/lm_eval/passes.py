"""One pass of lm-eval over a task with a model that is in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, TextIO

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from forgetless.evaluation.lm_eval.code import sandboxed_templates
from forgetless.evaluation.lm_eval.tasks import OpenTask, harness_quiet
from forgetless.evaluation.lm_eval.told import told
from forgetless.evaluation.loaded import Progress, Watch
from forgetless.models.pair import TunedModel
from forgetless.models.state import random_state_kept
from forgetless.models.targets import base_of

# The harness's own seeds: figures are then those of its command line.
_RANDOM_SEED, _OTHER_SEED = 0, 1234


@dataclass(frozen=True)
class TaskPass:
    """What came of one pass.

    Attributes:
        rows: Hash of all prompts and targets: what was asked.
        prompts: Of each row.
        targets: What would have been right, as text.
        values: `metric,filter` → a figure of each row, None where a row has none.
        answers: What was generated, filtered; empty where nothing is.
    """

    rows: str
    prompts: list[str]
    targets: list[str]
    values: dict[str, list[Any]]
    answers: list[str]


class _Harness(HFLM):
    """The model that is in memory; no bars, and a count of finished requests."""

    def __init__(self, *args: Any, watch: _Requests, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = watch
        self.set_cache_hook(watch)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._watch.begin(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._watch.begin(len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._watch.begin(len(requests))
        return super().generate_until(requests, disable_tqdm=True)


class _Requests:
    """Where the harness would keep answers: it is told of each, one by one."""

    def __init__(self, progress: Progress | None, stage: str, stderr: TextIO) -> None:
        self._progress, self._stage, self._stderr = progress, stage, stderr
        self._watch: Watch | None = None

    def begin(self, total: int) -> None:
        """A round of requests begins."""
        with redirect_stderr(self._stderr):
            self._watch = Watch(self._progress, self._stage, total)

    def add_partial(self, kind: str, request: object, result: object) -> None:
        """One is done."""
        if self._watch is not None:
            with redirect_stderr(self._stderr):
                self._watch(1)


def run_task(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenTask,
    *,
    batch_size: int,
    stage: str,
    stderr: TextIO,
    progress: Progress | None = None,
) -> TaskPass:
    """Ask all rows of a task; model, tokenizer and random states are as before afterwards.

    Args:
        model: In eval mode; whether its adapter is on is the caller's to say.
        tokenizer: Its tokenizer.
        opened: The task.
        batch_size: Rows a forward pass.
        stage: What progress is called.
        stderr: Where progress may write; standard error is closed to lm-eval.
        progress: Called with stage, requests done and requests in all.

    Raises:
        RecipeError: The task fails on its rows, or its template reaches for Python.
    """
    with _settings_kept(model), random_state_kept(), harness_quiet(), sandboxed_templates():
        _seed(opened)
        harness = _Harness(
            pretrained=base_of(model),
            # It gets a padding side and a padding token there.
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            watch=_Requests(progress, stage, stderr),
        )
        with told(opened.label):
            found = lm_eval.evaluate(
                lm=harness,
                task_dict={"tasks": {part.task_name: part for part in opened.parts}},
                limit=opened.wanted.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=opened.wanted.chat_template,
                fewshot_as_multiturn=opened.wanted.chat_template,
            )
    return _pass(found["samples"])


def _seed(opened: OpenTask) -> None:
    random.seed(_RANDOM_SEED)
    np.random.seed(_OTHER_SEED)  # noqa: NPY002  the state that tasks draw from
    torch.manual_seed(_OTHER_SEED)
    for part in opened.parts:
        part.set_fewshot_seed(seed=_OTHER_SEED)


@contextmanager
def _settings_kept(model: TunedModel) -> Iterator[None]:
    base = base_of(model)
    before = base.generation_config
    base.generation_config = copy.deepcopy(before)
    try:
        yield
    finally:
        base.generation_config = before


def _pass(samples: dict[str, list[dict[str, Any]]]) -> TaskPass:
    """Samples, one for each row and filter, as figures by row."""
    places: dict[tuple[str, int], int] = {}
    prompts: list[str] = []
    targets: list[str] = []
    answers: list[str] = []
    asked = hashlib.sha256()
    for task, rows in samples.items():
        for row in rows:
            place = (task, row["doc_id"])
            if place not in places:
                places[place] = len(places)
                prompts.append(_text(row["arguments"][0][0]))
                targets.append(_text(row["target"]))
                texts = row["filtered_resps"]
                answers.append(texts[0] if texts and isinstance(texts[0], str) else "")
                keys = [task, row["doc_hash"], row["target_hash"]]
                keys += [repr(argument) for argument in row["arguments"]]
                asked.update(json.dumps(keys).encode())
    values: dict[str, list[Any]] = {}
    for task, rows in samples.items():
        for row in rows:
            for metric in row["metrics"]:
                column = values.setdefault(f"{metric},{row['filter']}", [None] * len(places))
                column[places[task, row["doc_id"]]] = _plain(row[metric])
    return TaskPass(asked.hexdigest()[:16], prompts, targets, values, answers)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _plain(value: Any) -> Any:
    """A row's number as float; of pairs and lists the numbers as they are, but of Python's types.

    Some functions of all rows take a whole number, such as a class, out of a pair as an index.
    """
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    return _listed(value)


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_listed(entry) for entry in value]
    return value
