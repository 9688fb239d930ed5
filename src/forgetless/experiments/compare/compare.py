"""`compare`: records of many runs → which method keeps most for what it gains, and how surely.

Every method is held against plain LoRA at its own best: each at the rate that was best on rows kept
out of training, and at the same gain, which LoRA reaches with another rate, with weight decay, or
with its update scaled down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from forgetless.experiments.compare.against_lora import AgainstLoRA
from forgetless.experiments.compare.arms import Arm, Cell, arms_of
from forgetless.experiments.compare.axes import (
    Axis,
    further_gains,
    gain_axes,
    leading,
    left_out,
    loss_axes,
)
from forgetless.experiments.compare.bands import band_of
from forgetless.experiments.compare.figures import (
    Figures,
    interval_of,
    lora_family,
    scales_of,
    scales_of_some,
)
from forgetless.experiments.compare.fronts import fronts_of
from forgetless.experiments.compare.laws import law_of
from forgetless.experiments.compare.results import (
    ArmResult,
    Comparison,
    Cost,
    Law,
    LawResidual,
    Measure,
    OnFront,
    Point,
)
from forgetless.experiments.compare.sampling import RESAMPLES, Sampler, combine
from forgetless.experiments.compare.words import notes_of, title_of, words_of
from forgetless.experiments.numbers import join_words
from forgetless.experiments.record import Record
from forgetless.experiments.runs import Run, kl_floor, name_runs, not_comparable

_ROUNDING = 1e-7  # a KL of less is rounding of float32 sums


def compare(records: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare methods over learning rates and seeds.

    Args:
        records: Any number, of one base model, train data and evaluation rows.
        resamples: Of rows and of seeds, for all intervals.
        seed: Of the resampling.

    Returns:
        Plain values. Nothing but a title where the records cannot be compared, or claim nothing.

    Raises:
        ArtefactError: Two records of the same method, rate and seed; row figures that do not match.
    """
    runs = name_runs(records)
    if any(record.recipe.get("claims") is False for record in records):
        return _nothing("Quick runs: nothing is claimed")
    reasons = not_comparable(runs)
    if reasons:
        return _nothing(f"{len(runs)} runs that cannot be compared: {join_words(reasons)}")
    return _Comparing(runs, Sampler(resamples, seed)).result()


@dataclass(frozen=True)
class _Plane:
    """One gain, one loss, and the law of that loss."""

    gain: Axis
    loss: Axis


class _Comparing:
    """One comparison while it is made."""

    def __init__(self, runs: Sequence[Run], sampler: Sampler) -> None:
        records = [run.record for run in runs]
        self.arms = arms_of(records)
        self.figures = Figures(sampler)
        self.gains, self.further = gain_axes(runs), further_gains(runs)
        self.losses = loss_axes(runs)
        self.lacking = left_out(runs, [*self.gains, *self.further, *self.losses])
        self.floor = max([_ROUNDING, *(kl_floor(run) for run in runs)])
        self.chosen: dict[str, Cell] = {
            arm.name: cell for arm in self.arms if (cell := arm.chosen()) is not None
        }
        self.lora_arm = self._reference()
        self.lora = self.chosen.get(self.lora_arm.name) if self.lora_arm else None

    def _reference(self) -> Arm | None:
        """The plain LoRA, of several, that did best on rows kept out of training."""
        known = [arm for arm in self.arms if arm.is_lora and arm.name in self.chosen]

        def score(arm: Arm) -> float:
            cell = self.chosen[arm.name]
            found = cell.validation_nll(frozenset(cell.seeds))
            return math.inf if found is None else found

        return min(known, key=score, default=None)

    def result(self) -> Comparison:
        laws, residuals = self._laws()
        fronts, volumes = self._fronts()
        arms = tuple(self._arm(arm, residuals, fronts) for arm in self.arms)
        return Comparison(
            arms=arms,
            points=tuple(self._points()),
            laws=tuple(laws),
            hypervolumes=volumes,
            title=title_of(arms),
            words=tuple(words_of(arms, laws)),
            notes=tuple(
                [
                    *notes_of(arms, self._level(), self._lora_name(), self._fewest_seeds()),
                    *self.lacking,
                    *self._scales_left_out(),
                ]
            ),
        )

    def _fewest_seeds(self) -> int:
        """Of plain LoRA and LoRA with decay, at any rate: what methods are held against."""
        family = lora_family(self.arms)
        return min((len(cell.seeds) for arm in family for cell in arm.cells), default=0)

    def _scales_left_out(self) -> list[str]:
        return [
            f"Left out: {arm.name} at rate {cell.rate:g} with ΔW times "
            f"{join_words([f'{scale:g}' for scale in found])}, which some seeds lack."
            for arm in self.arms
            for cell in arm.cells
            if (found := scales_of_some(cell))
        ]

    def _lora_name(self) -> str | None:
        """Which one stands for plain LoRA, where there are several."""
        several = sum(arm.is_lora for arm in self.arms) > 1
        return self.lora_arm.name if several and self.lora_arm else None

    def _arm(
        self,
        arm: Arm,
        residuals: dict[str, list[LawResidual]],
        fronts: dict[str, list[OnFront]],
    ) -> ArmResult:
        cell = self.chosen.get(arm.name)
        head = ArmResult(
            name=arm.name,
            is_lora=arm.is_lora,
            decay=arm.decay,
            rates=tuple(c.rate for c in arm.cells),
            chosen_rate=cell.rate if cell else None,
            validation_nll={
                f"{c.rate:g}": nll
                for c in arm.cells
                if (nll := c.validation_nll(frozenset(c.seeds))) is not None
            },
            seeds=cell.seeds if cell else (),
            residuals=tuple(residuals.get(arm.name, ())),
        )
        if cell is None:
            return head
        size, drift = self.figures.update_size(cell), self.figures.drift(cell)
        gain = self.gains[0] if self.gains else None
        return head.model_copy(
            update={
                "measures": tuple(self._measures(cell)),
                "update_size": interval_of(size) if size else None,
                "drift": interval_of(drift) if drift else None,
                "gain_to_lora": tuple(self._gain_to_lora(arm, cell)),
                "matched": tuple(
                    found
                    for plane in self._planes(self.losses)
                    if (found := self._against(plane).match(arm, cell, self._level()))
                ),
                "fronts": tuple(fronts.get(arm.name, ())),
                "band": band_of(
                    self.figures, arm, cell, self.lora, gain, leading(self.losses)
                ) if gain else None,
                "cost": _cost(arm, cell),
            }
        )  # fmt: skip

    def _measures(self, cell: Cell, scale: float = 1.0) -> list[Measure]:
        found = []
        for axis in (*self.gains, *self.further, *self.losses):
            figure = self.figures.of(cell, axis, scale)
            if figure is not None:
                own = (cell, axis) if scale == 1.0 else (None, None)
                found.append(
                    Measure(
                        item=axis.item,
                        metric=axis.metric,
                        side=axis.side,
                        figure=interval_of(figure, *own),
                        seeds_sd=_sd(cell, axis) if scale == 1.0 else None,
                    )
                )
        return found

    def _gain_to_lora(self, arm: Arm, cell: Cell) -> list[Measure]:
        """How much more is gained than by plain LoRA at its chosen rate, on the same rows."""
        if self.lora is None or arm.is_lora:
            return []
        found = []
        for axis in (*self.gains, *self.further):
            ours, theirs = self.figures.of(cell, axis), self.figures.of(self.lora, axis)
            if ours is not None and theirs is not None:
                difference = combine(lambda a, b: a - b, ours, theirs)
                found.append(
                    Measure(
                        item=axis.item,
                        metric=axis.metric,
                        side=axis.side,
                        figure=interval_of(difference),
                    )
                )
        return found

    def _against(self, plane: _Plane) -> AgainstLoRA:
        return AgainstLoRA(self.figures, self.arms, plane.gain, plane.loss, self.floor)

    def _planes(self, losses: Sequence[Axis]) -> list[_Plane]:
        return [_Plane(gain, loss) for gain in self.gains for loss in losses]

    def _level(self) -> float:
        """95 % for all verdicts together (Bonferroni): of ten, half a one would be wrong else."""
        others = sum(arm.decay is None and arm.name in self.chosen for arm in self.arms)
        return 1 - 0.05 / max(1, others * len(self._planes(leading(self.losses))))

    def _fronts(self) -> tuple[dict[str, list[OnFront]], dict[str, float]]:
        found: dict[str, list[OnFront]] = {}
        volumes = {}
        chosen = [(arm, self.chosen[arm.name]) for arm in self.arms if arm.name in self.chosen]
        for plane in self._planes(leading(self.losses)):
            front = fronts_of(self.figures, chosen, self.lora, plane.gain, plane.loss)
            if front is not None:
                volumes[f"{plane.gain.name} × {plane.loss.name}"] = front[1]
                for name, place in front[0].items():
                    found.setdefault(name, []).append(place)
        return found, volumes

    def _laws(self) -> tuple[list[Law], dict[str, list[LawResidual]]]:
        laws, residuals = [], dict[str, list[LawResidual]]()
        for axis in leading(self.losses):
            fitted = (
                law_of(self.figures, self.arms, axis, self.floor) if axis.is_divergence else None
            )
            if fitted is not None:
                laws.append(fitted[0])
                for name, one in fitted[1].items():
                    residuals.setdefault(name, []).append(one)
        return laws, residuals

    def _points(self) -> list[Point]:
        found = []
        for arm in self.arms:
            for cell in arm.cells:
                size, drift = self.figures.update_size(cell), self.figures.drift(cell)
                for scale in scales_of(cell):
                    found.append(
                        Point(
                            arm=arm.name,
                            rate=cell.rate,
                            scale=scale,
                            seeds=cell.seeds,
                            is_chosen=cell is self.chosen.get(arm.name) and scale == 1.0,
                            measures=tuple(self._measures(cell, scale)),
                            update_size=size.estimate * abs(scale) if size else None,
                            drift=drift.estimate * scale**2 if drift else None,
                        )
                    )
        return found


def _nothing(title: str) -> Comparison:
    return Comparison(arms=(), points=(), laws=(), hypervolumes={}, title=title, words=(), notes=())


def _sd(cell: Cell, axis: Axis) -> float | None:
    """Standard deviation over seeds."""
    found = [axis.figure(record.evaluation) for record in cell.records]
    means = [one.mean for one in found if one is not None]
    return stdev(means) if len(means) > 1 else None


def _cost(arm: Arm, cell: Cell) -> Cost:
    records = cell.records
    # The first run pays for what the others take from the cache.
    calibrated = [r.phases.get("calibrate", 0.0) for one in arm.cells for r in one.records]
    processor = [r.processor.get("train") for r in records]
    memory = [r.memory.get("process") for r in records]
    return Cost(
        calibration_seconds=max(calibrated),
        training_seconds=mean(r.phases.get("train", 0.0) for r in records),
        training_processor_seconds=_mean(processor),
        trainable_parameters=round(mean(r.training.trainable_parameters for r in records)),
        peak_memory=_mean(memory),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
