"""The figures of a comparison, each sampled once: arm × rate × scale × axis."""

from __future__ import annotations

from collections.abc import Sequence

from forgetless.evaluation.results import EvaluationReport
from forgetless.experiments.compare.arms import Arm, Cell
from forgetless.experiments.compare.axes import Axis
from forgetless.experiments.compare.results import Interval
from forgetless.experiments.compare.sampling import Figure, Sampler


class Figures:
    """Looks figures up, and samples them when they are first asked for."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._known: dict[tuple[int, float, Axis], Figure | None] = {}

    def of(self, cell: Cell, axis: Axis, scale: float = 1.0) -> Figure | None:
        """An axis of a cell over its seeds; None where a run was not measured on it."""
        key = (id(cell), scale, axis)
        if key not in self._known:
            found = reports_of(cell, scale)
            measured = all(axis.figure(report) is not None for report in found)
            self._known[key] = (
                self.sampler.figure(found, cell.seeds, axis) if found and measured else None
            )
        return self._known[key]

    def update_size(self, cell: Cell) -> Figure | None:
        """F_Δ of a cell; None where a run has none."""
        moved = [record.evaluation.movement for record in cell.records]
        sizes = [one.update_size for one in moved if one is not None]
        return self.sampler.constant(sizes, cell.seeds) if len(sizes) == len(moved) else None

    def drift(self, cell: Cell) -> Figure | None:
        """Drift of a cell on held-out preserve data; None where a run has none."""
        moved = [record.evaluation.movement for record in cell.records]
        found = [one.drift for one in moved if one is not None]
        return self.sampler.constant(found, cell.seeds) if len(found) == len(moved) else None


def reports_of(cell: Cell, scale: float) -> list[EvaluationReport]:
    """One a seed; empty where a run was not measured at that scale."""
    found = []
    for record in cell.records:
        reports = (record.evaluation, *record.scaled)
        report = next((one for one in reports if one.scale == scale), None)
        if report is None:
            return []
        found.append(report)
    return found


def scales_of(cell: Cell) -> list[float]:
    """Scales that every run of a cell was measured at, ascending."""
    sets = [{r.evaluation.scale, *(one.scale for one in r.scaled)} for r in cell.records]
    return sorted(set.intersection(*sets))


def scales_of_some(cell: Cell) -> list[float]:
    """Scales that some runs of a cell were measured at and others were not."""
    found = {one.scale for record in cell.records for one in record.scaled}
    return sorted(found - set(scales_of(cell)))


def interval_of(figure: Figure, cell: Cell | None = None, axis: Axis | None = None) -> Interval:
    """A figure with its 95 % interval.

    Of a level (`cell` and `axis` given) it is never narrower than the mean of the seeds' own
    intervals, which are exact for shares: nothing right in 100 rows is not nothing for sure.
    """
    found = figure.interval()
    if cell is not None and axis is not None:
        own = [axis.figure(record.evaluation) for record in cell.records]
        known = [one for one in own if one is not None and one.n > 1]
        if len(known) == len(own):
            low = sum(one.low for one in known) / len(known)
            high = sum(one.high for one in known) / len(known)
            found = (
                (min(found[0], low), max(found[1], high)) if found and len(own) > 1 else (low, high)
            )
    return as_interval(figure.estimate, found)


def as_interval(value: float, ends: tuple[float, float] | None) -> Interval:
    """Plain values; what is not finite is None."""
    finite = [v if v == v and abs(v) != float("inf") else None for v in (value, *(ends or ()))]
    return Interval(
        value=finite[0], low=finite[1] if ends else None, high=finite[2] if ends else None
    )


def lora_family(arms: Sequence[Arm]) -> list[Arm]:
    """Plain LoRA and LoRA with weight decay."""
    return [arm for arm in arms if arm.decay is not None]
