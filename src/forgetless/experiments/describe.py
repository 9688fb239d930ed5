"""The record of a run that has gone through all its phases: what ran, on what, with what result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from forgetless.evaluation.results import EvaluationReport
from forgetless.experiments.output import plain_recipe
from forgetless.experiments.prepare import Prepared
from forgetless.experiments.record import LayerStart, ModelFacts, Record, TrainingFacts
from forgetless.experiments.started import Started
from forgetless.experiments.surroundings import git_commit, package_versions
from forgetless.methods import method_options
from forgetless.models.load import LoadedModel, describe_hardware, model_fingerprint
from forgetless.models.pair import reference_of
from forgetless.models.targets import USUAL_REASONS, base_of
from forgetless.recipe import Recipe


def describe(
    recipe: Recipe,
    loaded: LoadedModel,
    data: Prepared,
    started: Started,
    *,
    created: str,
    phases: dict[str, float],
    warnings: list[str],
    training: TrainingFacts,
    evaluation: EvaluationReport,
    scaled: list[EvaluationReport],
    export: dict[str, Any],
    files: dict[str, str],
    model_files: dict[str, str],
) -> Record:
    """Put the results of a run together with all that a reader needs to repeat it."""
    return Record(
        label=label_of(recipe),
        created=created,
        seed=recipe.seed,
        method=method_options(started.method),
        recipe=plain_recipe(recipe),
        versions=package_versions(),
        git_commit=git_commit(Path.cwd()),
        hardware=describe_hardware(),
        model=_model_facts(loaded, started),
        data=data.facts,
        phases=phases,
        layers={
            name: LayerStart(site=start.site, rank=start.rank, diagnostics=dict(start.diagnostics))
            for name, start in started.starts.items()
        },
        skipped_layers=started.skipped,
        warnings=warnings,
        training=training,
        evaluation=evaluation,
        scaled=scaled,
        export=export,
        files=files,
        model_files=model_files,
    )


def label_of(recipe: Recipe) -> str:
    """The recipe's, else its method and regularisers: `lora + drift`."""
    named = [recipe.method, *recipe.training.regularisers]
    return recipe.label or " + ".join(str(one["name"]) for one in named)


def skipped_notes(skipped: Mapping[str, str]) -> list[str]:
    """What to tell of layers without an adapter: the usual ones counted, each other by name."""
    usual = [reason for reason in skipped.values() if reason in USUAL_REASONS]
    notes = [
        f"layer {layer} is skipped: {reason}"
        for layer, reason in skipped.items()
        if reason not in USUAL_REASONS
    ]
    if usual:
        layers = "1 layer" if len(usual) == 1 else f"{len(usual)} layers"
        notes.insert(0, f"{layers} skipped ({', '.join(dict.fromkeys(usual))})")
    return notes


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` and the like."""
    return str(dtype).removeprefix("torch.")


def _model_facts(loaded: LoadedModel, started: Started) -> ModelFacts:
    base = base_of(reference_of(started.model))
    adapter = sum(p.numel() for name, p in base.named_parameters() if "lora_" in name)
    return ModelFacts(
        name=loaded.name,
        revision=loaded.revision,
        fingerprint=model_fingerprint(base),
        architecture=type(base).__name__,
        parameters=base.num_parameters() - adapter,
        dtype=dtype_name(loaded.dtype),
        device=str(loaded.device),
        quantization=loaded.quantization,
    )
