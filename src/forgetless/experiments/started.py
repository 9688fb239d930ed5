"""The start of a run: an adapter on the base, or a copy of it, and the moments collected for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forgetless.adapters.attach import attach_rows
from forgetless.adapters.from_data import Calibrated
from forgetless.adapters.start import LayerStart
from forgetless.calibration.calibrate import calibrate
from forgetless.calibration.engine import SiteMoments
from forgetless.calibration.weights import weights_that_count
from forgetless.experiments.prepare import Prepared
from forgetless.experiments.regularised import calibrated_for
from forgetless.methods.base import AnyMethod, Method, Role
from forgetless.models.load import LoadedModel
from forgetless.models.pair import TunedModel
from forgetless.models.targets import find_targets
from forgetless.processes import ALONE, Processes
from forgetless.recipe import Recipe
from forgetless.training.full import copied


@dataclass(frozen=True, slots=True)
class Started:
    """What is to be trained, and what was learned on the way.

    Attributes:
        model: A PEFT model, or a float32 copy beside its base.
        method: With all its options.
        starts: Of every adapted layer.
        skipped: Layers with weights that got no adapter, with the reason.
        moments: By role; calibration moments of the base, where they are still at hand.
        calibrated: By role: on how much.
        passes: Forward passes over the data of a role, one for each group of layers.
        moment_bytes: What the moments held at a time take.
        origin: What the start follows from besides the base.
    """

    model: TunedModel
    method: AnyMethod
    starts: dict[str, LayerStart]
    skipped: dict[str, str]
    moments: dict[Role, SiteMoments]
    calibrated: dict[Role, Calibrated]
    passes: int
    moment_bytes: int
    origin: str


def start_run(
    recipe: Recipe,
    method: AnyMethod,
    loaded: LoadedModel,
    data: Prepared,
    *,
    cache: Path,
    progress: Callable[[Role, int, int], None],
    processes: Processes = ALONE,
) -> Started:
    """Calibrate for method and regularisers, and make what trains.

    Raises:
        ForgetlessError: Data that cannot be calibrated on, or a base that cannot hold the method.
    """
    kept = cache if recipe.calibration.cache else None
    if not isinstance(method, Method):
        return _full(recipe, method, loaded, data, kept, progress, processes)
    attached = attach_rows(
        loaded.model,
        loaded.tokenizer,
        method=method,
        row_sets={"train": data.train, "preserve": data.preserve},
        also=calibrated_for(recipe),
        targets=recipe.targets,
        source_weights=recipe.calibration.source_weights,
        batch_size=recipe.calibration.batch_size,
        min_tokens=recipe.calibration.min_tokens,
        memory_budget=recipe.calibration.memory_budget,
        cache=kept,
        seed=recipe.seed,
        progress=progress,
        processes=processes,
    )
    return Started(
        model=attached.model,
        method=attached.method,
        starts=attached.starts,
        skipped=attached.skipped,
        moments=attached.moments,
        calibrated=attached.calibrated,
        passes=attached.passes,
        moment_bytes=attached.moment_bytes,
        origin=attached.origin,
    )


def _full(
    recipe: Recipe,
    method: AnyMethod,
    loaded: LoadedModel,
    data: Prepared,
    cache: Path | None,
    progress: Callable[[Role, int, int], None],
    processes: Processes,
) -> Started:
    moments: dict[Role, SiteMoments] = {}
    size = 0
    if calibrated_for(recipe):
        found = moments["preserve"] = calibrate(
            loaded.model,
            loaded.tokenizer,
            find_targets(loaded.model).targets,
            data.preserve,
            batch_size=recipe.calibration.batch_size,
            source_weights=recipe.calibration.source_weights,
            cache=cache,
            progress=lambda done, total: progress("preserve", done, total),
            processes=processes,
        )
        size = sum(m.width * (m.width + 1) * 4 for m in found.moments.values())
    # What `drift` pulls to follows from the moments, and so from how their sources count.
    calibrated_on = data.preserve if moments else ()
    weights = weights_that_count(calibrated_on, recipe.calibration.source_weights)
    origin = "the base" if weights == "tokens" else f"the base, sources weighed {weights}"
    calibrated = {role: Calibrated.on(found) for role, found in moments.items()}
    return Started(
        model=copied(loaded.model),
        method=method,
        starts={},
        skipped={},
        moments=moments,
        calibrated=calibrated,
        passes=len(moments),
        moment_bytes=size,
        origin=origin,
    )
