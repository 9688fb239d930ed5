"""The band of safe learning rates: how far off the best rate a user may be."""

from __future__ import annotations

from forgetless.experiments.compare.arms import Arm, Cell
from forgetless.experiments.compare.axes import Axis
from forgetless.experiments.compare.figures import Figures
from forgetless.experiments.compare.results import Band

MOST_OF_THE_GAIN = 0.9
LOSS_MARGIN = 1e-9


def band_of(
    figures: Figures, arm: Arm, chosen: Cell, lora: Cell | None, gain: Axis, losses: list[Axis]
) -> Band | None:
    """Rates next to the chosen one, without a gap, that gain most of its gain and lose no more.

    No more than plain LoRA loses at its chosen rate; than the arm itself, where there is none.

    Args:
        figures: Of the comparison.
        arm: With its cells by rate.
        chosen: One of them.
        lora: Plain LoRA at its chosen rate.
        gain: What is gained.
        losses: What may not be lost.

    Returns:
        None where the arm was not measured, nothing was to be kept, or with a single rate.
    """
    if len(arm.cells) < 2 or not losses or figures.of(chosen, gain) is None:
        return None
    limit = chosen if lora is None else lora

    def is_safe(cell: Cell) -> bool:
        own, best = figures.of(cell, gain), figures.of(chosen, gain)
        if own is None or best is None or own.estimate < MOST_OF_THE_GAIN * best.estimate:
            return False
        for axis in losses:
            lost, allowed = figures.of(cell, axis), figures.of(limit, axis)
            if lost is None or allowed is None or lost.estimate > allowed.estimate + LOSS_MARGIN:
                return False
        return True

    place = arm.cells.index(chosen)
    if not is_safe(chosen):
        return None
    low = high = place
    while low > 0 and is_safe(arm.cells[low - 1]):
        low -= 1
    while high + 1 < len(arm.cells) and is_safe(arm.cells[high + 1]):
        high += 1
    return Band(
        low=arm.cells[low].rate,
        high=arm.cells[high].rate,
        tried=tuple(cell.rate for cell in arm.cells),
    )
