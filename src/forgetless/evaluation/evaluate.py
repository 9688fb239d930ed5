"""`evaluate`: what an adapter gained, what it kept, and how far it moved, against the true base."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.calibration.engine import SiteMoments
from forgetless.data.loading import load_rows
from forgetless.data.rows import RowSet
from forgetless.data.tokens import tokenize
from forgetless.errors import AdapterError, ForgetlessWarning, ModelError, RecipeError
from forgetless.evaluation.base_cache import BaseCache
from forgetless.evaluation.items import EvaluationItem
from forgetless.evaluation.judges import Judge, check_judges
from forgetless.evaluation.lm_eval.spec import (
    LmEvalInput,
    LmEvalRecipe,
    parse_lm_eval,
    refuse_shared_names,
)
from forgetless.evaluation.lm_eval.tasks import OpenTask, open_tasks
from forgetless.evaluation.loaded import LoadedItem, Progress, check_item
from forgetless.evaluation.measure import measure_item
from forgetless.evaluation.movement import measure_movement
from forgetless.evaluation.parse import ItemInput, parse_items
from forgetless.evaluation.results import EvaluationReport, ItemResult, Movement, Side
from forgetless.evaluation.tuned_model import active_adapter, opened, scaled
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.pair import TunedModel, reference_of
from forgetless.models.placement import input_device
from forgetless.models.state import left_as_found, random_state_kept
from forgetless.models.targets import base_of

MOVEMENT_ROWS = 64  # of each retention item, where no movement data are given


def evaluate(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    gain: Sequence[ItemInput] = (),
    retention: Sequence[ItemInput] = (),
    lm_eval: LmEvalInput | None = None,
    allow_task_code: bool = False,
    adapter: Path | str | None = None,
    base: PreTrainedModel | None = None,
    movement_data: Sequence[RowSet] | None = None,
    calibration_moments: SiteMoments | None = None,
    scale: float = 1.0,
    samples: int = 3,
    base_cache: Path | str | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure an adapter, or a model tuned in any way, against its base on held-out data.

    The base is the same model with the adapter disabled, or `base`. Training mode and
    `requires_grad` are as before afterwards; a base that was given with an adapter folder is bare
    again.

    Args:
        model: A PeftModel with one active adapter, whoever trained it; a base with `adapter`; or a
            model of which any weight may have been tuned, with `base`.
        tokenizer: Its tokenizer.
        gain: Held-out data of the task that was trained: evaluation items, their keys as mappings,
            or anything that names data (a path, a hub id, a Dataset, a list of strings).
        retention: Held-out data of what must not be forgotten, likewise.
        lm_eval: Tasks of EleutherAI's lm-eval: names, mappings with the keys of `LmEvalTask`
            (`side`, `num_fewshot`, `limit`, `data_files`, …), or a mapping with `tasks`,
            `include_path`, `batch_size` and `samples`.
        allow_task_code: Whether the folder `include_path` may run Python.
        adapter: A folder with an adapter, where `model` is the bare base.
        base: The base of a `model` that was tuned in full, merged, or tuned in another way: a
            second model of the same architecture.
        movement_data: Held-out preserve rows for update size, drift and leakage. None: the first 64
            rows of each retention item. Empty: no movement.
        calibration_moments: Moments that the adapter was calibrated with.
        scale: Factor on ΔW: the same adapter turned down; with `base`, on the change of every
            weight.
        samples: How many generations of base and tuned model to show for each item with prompts.
        base_cache: Folder for the base's own figures, which are the same for every adapter.
        judges: Functions of your own that score answers, more is better, by a name for the report:
            called with lists of prompts, answers and references of every item that generates.
        progress: Called with stage, rows done and rows in all.

    Returns:
        Every metric of base and tuned model, its paired change, 95 % intervals, and movement.

    Raises:
        ForgetlessError: The message says where, what was expected, what came, and what to do.
    """
    started = time.perf_counter()
    _check_options(scale, samples)
    _refuse_encoder_decoder(base_of(model))
    items = parse_items(gain, retention)
    harness = parse_lm_eval(lm_eval)
    check_judges(judges or {})
    names = [item.name for _, item in items]
    refuse_shared_names(harness, names)
    if not items and not movement_data and harness is None:
        raise RecipeError(
            "evaluation: expected at least one gain or retention item, got none; "
            "pass gain=[...] or retention=[...]"
        )
    tasks = []
    if harness is not None:
        tasks = open_tasks(harness, taken=names, allow_code=allow_task_code)
    with ExitStack() as stack:
        stack.enter_context(left_as_found(model))
        tuned = stack.enter_context(opened(model, adapter, base))
        name = active_adapter(tuned)
        if scale != 1.0:
            stack.enter_context(scaled(tuned, scale, name))
        stack.enter_context(torch.no_grad())
        tuned.eval()
        folder = Path(base_cache) if base_cache is not None else None
        reference = reference_of(tuned)
        loaded = _load(items, reference, tokenizer, folder, judges or {})
        _warn_of_rounding(tuned, loaded)
        cache = BaseCache(folder, _context(reference) if folder is not None else ())
        results = tuple(
            measure_item(tuned, tokenizer, one, samples=samples, cache=cache, progress=progress)
            for one in loaded
        )
        results += _task_results(tuned, tokenizer, tasks, harness, cache, progress)
        movement = _movement(
            tuned, tokenizer, name, loaded, movement_data, calibration_moments, progress
        )
    return EvaluationReport(
        items=results, movement=movement, scale=scale, seconds=time.perf_counter() - started
    )


def _task_results(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[OpenTask],
    settings: LmEvalRecipe | None,
    cache: BaseCache,
    progress: Progress | None,
) -> tuple[ItemResult, ...]:
    if settings is None:
        return ()
    # It is an extra, and takes a second to import.
    from forgetless.evaluation.lm_eval.measure import measure_task

    with random_state_kept():  # lm-eval draws a name for a task wherever it is asked for its own
        return tuple(
            measure_task(model, tokenizer, task, settings, cache=cache, progress=progress)
            for task in tasks
        )


def _check_options(scale: float, samples: int) -> None:
    if not math.isfinite(scale):
        raise RecipeError(
            f"evaluation: expected a finite scale, got {scale}; pass a number such as 0.5"
        )
    if samples < 0:
        raise RecipeError(
            f"evaluation: expected samples of 0 or more, got {samples}; pass 0 to show none"
        )


def _refuse_encoder_decoder(base: PreTrainedModel) -> None:
    if base.config.is_encoder_decoder:
        raise ModelError(
            f"evaluation: expected a causal language model, got {type(base).__name__}, an "
            "encoder-decoder; measure it in your own code (attach, export and load_adapter work)"
        )


def _load(
    items: Sequence[tuple[Side, EvaluationItem]],
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None,
    judges: Mapping[str, Judge],
) -> list[LoadedItem]:
    """Rows and tokens of every item, checked before the first forward pass."""
    loaded = []
    for side, item in items:
        rows = load_rows(
            item, tokenizer, model=model, cache=folder, needs_completion=item.needs_completion
        )
        # What was trained ends with the end-of-text token; what must be kept is text as it stands.
        tokens = tokenize(rows, tokenizer, append_eos=side == "gain")
        one = LoadedItem(side, item, rows, tokens, judges)
        check_item(one)
        loaded.append(one)
    if judges and not any(one.generates for one in loaded):
        raise RecipeError(
            f"judges: expected an item whose answers are generated for {', '.join(judges)} to "
            "judge, got none; add a metric such as refusal or coherent to one"
        )
    return loaded


def _warn_of_rounding(model: TunedModel, loaded: Sequence[LoadedItem]) -> None:
    """Small values of KL drown in the rounding of half-precision activations.

    Adapters whose KL is next to nothing in float32 show about 0.003 nats a token in bfloat16.
    """
    if not any("kl" in one.item.metrics for one in loaded):
        return
    dtypes = {"base": base_of(reference_of(model)).dtype, "tuned model": base_of(model).dtype}
    coarse = [name for name, dtype in dtypes.items() if dtype.itemsize < 4]
    if coarse:
        dtype = str(dtypes[coarse[0]]).removeprefix("torch.")
        warnings.warn(
            f"evaluation: the {coarse[0]} computes in {dtype}; KL below about 0.003 nats a token "
            "is rounding: load the model in float32 to compare small values",
            ForgetlessWarning,
            stacklevel=3,
        )


def _context(model: nn.Module) -> tuple[str, ...]:
    """What the base's figures depend on, besides the tokens."""
    return (model_fingerprint(model), input_device(base_of(model)).type)


def _movement(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str,
    loaded: Sequence[LoadedItem],
    row_sets: Sequence[RowSet] | None,
    moments: SiteMoments | None,
    progress: Progress | None,
) -> Movement | None:
    chosen = row_sets
    if chosen is None:
        kept = [one.rows for one in loaded if one.side == "retention"]
        chosen = [RowSet(rows.spec, rows.rows[:MOVEMENT_ROWS]) for rows in kept]
    if not chosen:
        return None
    total, done = sum(len(rows.rows) for rows in chosen), 0

    def watch(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress("movement", done, total)

    try:
        return measure_movement(
            model, tokenizer, chosen, adapter=adapter, calibration_moments=moments, progress=watch
        )
    except AdapterError as error:
        if row_sets is not None:
            raise
        warnings.warn(f"movement is not measured: {error}", ForgetlessWarning, stacklevel=3)
        return None
