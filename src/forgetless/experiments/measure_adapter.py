"""Measure what somebody trained, with the base model and evaluation items of a recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from forgetless.adapters.exported_files import WHOLE_MODEL
from forgetless.adapters.load import read_adapter_config
from forgetless.adapters.plain_lora import beyond_plain_lora
from forgetless.atomic import write_atomically
from forgetless.errors import ArtefactError, RecipeError
from forgetless.evaluation.evaluate import evaluate
from forgetless.evaluation.results import EvaluationReport
from forgetless.experiments.adapter_folder import adapter_folder
from forgetless.experiments.base_model import load_base
from forgetless.experiments.checks import check_readable, check_tasks, items_of
from forgetless.experiments.exporting import checkpoint_dtype
from forgetless.experiments.progress import Progress, warnings_heard
from forgetless.models.cache import cache_dir
from forgetless.models.load import load_model
from forgetless.recipe import Recipe
from forgetless.training.quiet import libraries_quiet


def measure_adapter(
    recipe: Recipe,
    adapter: Path,
    *,
    tuned: str | None = None,
    progress: Progress | None = None,
    allow_task_code: bool = False,
) -> list[EvaluationReport]:
    """Gain, retention and movement of any LoRA of PEFT, or of a whole model beside its base.

    At scale 1, then at the recipe's `scales`. Nothing is known of the training rows: that
    they are apart from the evaluation rows is the reader's to check.

    Args:
        recipe: Its model and `evaluation` are used.
        adapter: Folder of the adapter, or of a run; not looked at where `tuned` is given.
        tuned: A whole model, by path or hub id, or the folder of a run that trained one.
        progress: Hears of the phases, and of warnings.
        allow_task_code: Whether the recipe's folder of lm-eval tasks may run Python.

    Raises:
        RecipeError: The recipe names nothing to measure, or `tuned` is no model.
        AdapterError: There is no adapter in the folder.
    """
    heard = progress or Progress()
    wanted = recipe.evaluation
    if not wanted.measures:
        raise RecipeError("evaluation: expected gain or retention items, got none; add some")
    whole = _whole_model(adapter if tuned is None else Path(tuned)) or tuned
    if whole is not None:
        _check_tuned(whole)
    folder = adapter_folder(adapter) if whole is None else None
    scales = [scale for scale in wanted.scales or () if scale != 1.0]
    beyond = beyond_plain_lora(read_adapter_config(folder)) if folder and scales else []
    if beyond:
        raise RecipeError(
            f"evaluation.scales: expected an adapter that is its update alone, got {beyond[0]} in "
            f"{folder}, which no scale reaches; leave scales out"
        )
    check_readable(items_of(recipe))
    check_tasks(recipe, allow_task_code=allow_task_code)
    with libraries_quiet(), warnings_heard(heard.warn):
        with heard.phase("load"):
            loaded = load_base(recipe, heard)
            measured = loaded.model if whole is None else _load_tuned(whole, recipe)
        reports = []
        for scale in (1.0, *scales):
            with heard.phase(f"evaluate at scale {scale:g}"):
                reports.append(
                    evaluate(
                        measured,
                        loaded.tokenizer,
                        adapter=folder,
                        base=None if whole is None else loaded.model,
                        gain=wanted.gain,
                        retention=wanted.retention,
                        lm_eval=wanted.lm_eval,
                        allow_task_code=allow_task_code,
                        movement_data=None if scale == 1.0 else (),
                        scale=scale,
                        samples=wanted.samples if scale == 1.0 else 0,
                        base_cache=cache_dir() / "runs",
                        progress=lambda stage, done, total: heard.advance(done, total, stage),
                    )
                )
    return reports


def _whole_model(folder: Path) -> str | None:
    """The model of a run that trained every weight."""
    return str(folder / "model") if WHOLE_MODEL.is_in(folder / "model") else None


def _check_tuned(name: str) -> None:
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise RecipeError(
            f"--tuned {name}: expected a model, a hub id, or a run that trained every weight, got "
            "a folder without config.json; an adapter is measured with --adapter"
        )


def _load_tuned(name: str, recipe: Recipe) -> PreTrainedModel:
    """In the recipe's dtype; in float32 where it was saved so: rounding would take small steps."""
    is_float32 = Path(name).is_dir() and checkpoint_dtype(name, None) == torch.float32
    return load_model(
        name,
        dtype="float32" if is_float32 else recipe.dtype,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
    ).model


def check_figures_file(path: Path) -> None:
    """Refuse, before anything is measured, a file that figures could not be written to.

    Raises:
        ArtefactError: A folder, a file of something else, or a place that cannot be written to.
    """
    if path.is_dir():
        raise ArtefactError(f"{path}: expected a file to write, got a folder; add a file name")
    if path.exists() and not _holds_figures(path):
        raise ArtefactError(
            f"{path}: expected a new file, or figures to replace, got a file of something else; "
            "choose another name"
        )
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ArtefactError(
            f"{path}: expected a file that can be written, got one in {above}, which cannot be "
            "written to; choose another place"
        )


def _holds_figures(path: Path) -> bool:
    """Whether a file is one that `write_figures` wrote; an empty one holds nothing to lose."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if text.strip() else []
    except ValueError:  # no JSON, or no UTF-8
        return False
    return isinstance(found, list) and all(
        isinstance(entry, dict) and entry.keys() >= {"items", "scale"} for entry in found
    )


def write_figures(reports: Sequence[EvaluationReport], path: Path) -> Path:
    """Write all reports as JSON."""
    figures = [report.model_dump(mode="json") for report in reports]
    return write_atomically(path, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
