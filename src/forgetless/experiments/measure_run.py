"""What a run measures once it is trained: the whole adapter, and the same one turned down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from forgetless.data.rows import RowSet
from forgetless.evaluation.evaluate import evaluate
from forgetless.evaluation.items import EvaluationItem, teacher_forced
from forgetless.evaluation.results import EvaluationReport
from forgetless.experiments.started import Started
from forgetless.models.load import LoadedModel
from forgetless.recipe import EvaluationRecipe

# Plain LoRA turned down: what a method must beat to be worth its calibration.
BASELINE_SCALES = (0.25, 0.5)


def measure_run(
    wanted: EvaluationRecipe,
    loaded: LoadedModel,
    started: Started,
    *,
    cache: Path,
    advance: Callable[[int, int, str], None],
    allow_task_code: bool = False,
) -> tuple[EvaluationReport, list[EvaluationReport]]:
    """Measure what was trained.

    Args:
        wanted: The recipe's evaluation part.
        loaded: The base and its tokenizer.
        started: What was trained from it.
        cache: Keeps the base's own figures.
        advance: Hears of rows done, rows in all, and the stage.
        allow_task_code: Whether the recipe's folder of lm-eval tasks may run Python.

    Returns:
        The report of the whole adapter, and one for each scale, without generated answers.
    """
    if not wanted.measures:
        return EvaluationReport(items=()), []

    def measure(
        scale: float,
        samples: int,
        movement_data: Sequence[RowSet] | None = None,
        only: Callable[[EvaluationItem], EvaluationItem] = lambda item: item,
    ) -> EvaluationReport:
        return evaluate(
            started.model,
            loaded.tokenizer,
            gain=[only(item) for item in wanted.gain],
            retention=[only(item) for item in wanted.retention],
            lm_eval=wanted.lm_eval if scale == 1.0 else None,  # they generate, or take long
            allow_task_code=allow_task_code,
            movement_data=movement_data,
            calibration_moments=started.moments.get("preserve"),
            scale=scale,
            samples=samples,
            base_cache=cache,
            progress=lambda stage, done, total: advance(done, total, stage),
        )

    def scaled(scale: float) -> EvaluationReport:
        report = measure(scale, 0, (), teacher_forced)
        movement = None if whole.movement is None else whole.movement.scaled(scale)
        return report.model_copy(update={"movement": movement})  # follows exactly

    whole = measure(1.0, wanted.samples)
    if not (wanted.gain or wanted.retention):
        return whole, []
    return whole, [scaled(scale) for scale in _scales(wanted, started) if scale != 1.0]


def _scales(wanted: EvaluationRecipe, started: Started) -> Sequence[float]:
    if wanted.scales is not None:
        return wanted.scales
    return BASELINE_SCALES if started.method.form == "plain" else ()
