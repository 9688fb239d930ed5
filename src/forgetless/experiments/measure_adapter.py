"""Measure an adapter that somebody trained, with the model and evaluation items of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from forgetless.atomic import write_atomically
from forgetless.errors import RecipeError
from forgetless.evaluation.evaluate import evaluate
from forgetless.evaluation.results import EvaluationReport
from forgetless.experiments.progress import Progress
from forgetless.models.load import cache_dir, load_model
from forgetless.recipe import Recipe
from forgetless.training.quiet import libraries_quiet


def measure_adapter(
    recipe: Recipe,
    adapter: Path,
    *,
    progress: Progress | None = None,
    output: Path | None = None,
) -> list[EvaluationReport]:
    """Gain, retention and movement of any PEFT LoRA; at scale 1, then at the recipe's `scales`.

    Nothing is known of the adapter's training rows: that they are apart from the evaluation rows is
    the reader's to check.

    Args:
        recipe: Its model and `evaluation` are used.
        adapter: Folder of the adapter.
        progress: Hears of the phases.
        output: JSON file to write the reports to.

    Raises:
        RecipeError: The recipe names nothing to measure.
    """
    heard = progress or Progress()
    wanted = recipe.evaluation
    if not (wanted.gain or wanted.retention):
        raise RecipeError("evaluation: expected gain or retention items, got none; add some")
    with libraries_quiet():
        with heard.phase("load"):
            loaded = load_model(
                recipe.model,
                dtype=recipe.dtype,
                device=recipe.device,
                revision=recipe.revision,
                trust_remote_code=recipe.trust_remote_code,
            )
        reports = []
        for scale in (1.0, *(s for s in wanted.scales if s != 1.0)):
            with heard.phase(f"evaluate at scale {scale:g}"):
                reports.append(
                    evaluate(
                        loaded.model,
                        loaded.tokenizer,
                        adapter=adapter,
                        gain=wanted.gain,
                        retention=wanted.retention,
                        movement_data=None if scale == 1.0 else (),
                        scale=scale,
                        samples=wanted.samples if scale == 1.0 else 0,
                        base_cache=cache_dir() / "runs",
                        progress=lambda stage, done, total: heard.advance(done, total, stage),
                    )
                )
    if output is not None:
        figures = [report.model_dump(mode="json") for report in reports]
        text = json.dumps(figures, indent=1, ensure_ascii=False)
        write_atomically(output, text + "\n")
    return reports
