"""What a comparison returns: plain values, which are what its JSON holds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Outcome = Literal["kept more", "lost more", "gained more", "unclear", "gained nothing", "unknown"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Value):
    """A figure with its 95 % interval over evaluation rows and seeds; over rows with one seed.

    Ends are None where nothing tells: one row of one seed, or a figure that does not exist in more
    than a fifth of the resamples. So is the figure itself where it does not exist.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


class Measure(_Value):
    """Gain or loss on one metric: of the tuned model, against the base."""

    item: str
    metric: str
    side: Literal["gain", "retention"]
    figure: Interval
    seeds_sd: float | None = None


class Point(_Value):
    """One evaluation: an arm at a rate, over its seeds, with ΔW times `scale`."""

    arm: str
    rate: float
    scale: float
    seeds: tuple[int, ...]
    is_chosen: bool
    measures: tuple[Measure, ...]
    update_size: float | None
    drift: float | None


class Matched(_Value):
    """What an arm loses against what plain LoRA loses at the same gain.

    For a KL figures are ratios, the arm's to LoRA's; for other metrics differences.

    Attributes:
        gain: Item of the gain.
        item: What is to be kept.
        metric: How that is measured.
        is_ratio: Whether figures are ratios.
        scaled: Against LoRA turned down (ΔW times a factor), the best of its rates.
        tuned: Against the envelope of LoRA over rates and weight decays.
        best: Against the better of both: what the verdict is by.
        beyond: Whether the arm gains more than LoRA ever does; it is then held against LoRA at its
            largest gain.
        outcome: Which kept more at the same gain, by intervals for as many comparisons as are made;
            `gained more` where LoRA never gains as much, and less was not lost.
    """

    gain: str
    item: str
    metric: str
    is_ratio: bool
    scaled: Interval
    tuned: Interval
    best: Interval
    beyond: bool
    outcome: Outcome


class OnFront(_Value):
    """One arm at its chosen rate, in the plane of one gain and one loss.

    Attributes:
        is_on_front: Whether no other arm gains as much and loses as little.
        probability: Share of resamples (rows and seeds) in which it is on the front.
        hypervolume: Share of the rectangle from the base to tuned LoRA's loss and the largest gain
            that the arm dominates with all its rates and scales.
        alone: Hypervolume of all arms that would be missing without it.
    """

    gain: str
    item: str
    metric: str
    is_on_front: bool
    probability: float
    hypervolume: Interval
    alone: float


class LawResidual(_Value):
    """How an arm stands to the law of update size on one item.

    Attributes:
        factor: KL against what arms with updates of that size lose; 1 is the law.
        beats: Whether the interval is below 1, the factor beyond twice the law's scatter, and the
            arm's updates no smaller or larger than those of all others.
    """

    item: str
    metric: str
    factor: Interval
    beats: bool


class Law(_Value):
    """log loss = a + slope · log F_Δ over all arms and rates."""

    item: str
    metric: str
    slope: float
    r_squared: float
    scatter: float
    points: int


class Cost(_Value):
    """Means over the runs at the chosen rate; None where records do not tell.

    Calibration is that of the arm's run that took longest: the others had its moments and starts.
    """

    calibration_seconds: float
    training_seconds: float
    training_processor_seconds: float | None
    trainable_parameters: int
    peak_memory: float | None


class Band(_Value):
    """Rates beside the chosen one that are as safe: most of its gain, no more lost than LoRA."""

    low: float
    high: float
    tried: tuple[float, ...]


class ArmResult(_Value):
    """One arm. What depends on a chosen rate is empty where none can be chosen."""

    name: str
    is_lora: bool
    decay: float | None
    rates: tuple[float, ...]
    chosen_rate: float | None
    validation_nll: dict[str, float]
    seeds: tuple[int, ...]
    measures: tuple[Measure, ...] = ()
    update_size: Interval | None = None
    drift: Interval | None = None
    gain_to_lora: tuple[Measure, ...] = ()
    matched: tuple[Matched, ...] = ()
    fronts: tuple[OnFront, ...] = ()
    residuals: tuple[LawResidual, ...] = ()
    band: Band | None = None
    cost: Cost | None = None


class Comparison(_Value):
    """All arms, all points, and what follows from them in words."""

    arms: tuple[ArmResult, ...]
    points: tuple[Point, ...]
    laws: tuple[Law, ...]
    hypervolumes: dict[str, float]
    title: str
    words: tuple[str, ...]
    notes: tuple[str, ...]
