"""What an evaluation returns: plain values that go into the record as they stand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Side = Literal["gain", "retention"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Value):
    """A mean over rows with its 95 % bootstrap interval; `low` = `high` = `mean` where `n` is 1."""

    mean: float
    low: float
    high: float
    n: int


class MetricResult(_Value):
    """One metric on one item: the base, the tuned model, and the change paired by row.

    `base` and `change` are None for `kl`, which is a comparison itself. `change` is tuned minus
    base. For `nll` and `kl` the mean is over scored tokens and the bootstrap resamples rows.
    """

    metric: str
    base: Estimate | None
    tuned: Estimate
    change: Estimate | None
    higher_is_better: bool


class Sample(_Value):
    """One prompt with what base and tuned model generate for it."""

    prompt: str
    reference: str
    base: str
    tuned: str


class ItemResult(_Value):
    """All metrics of one evaluation item."""

    name: str
    side: Side
    rows: int
    truncated_rows: int
    metrics: dict[str, MetricResult]
    samples: tuple[Sample, ...] = ()


class LayerMovement(_Value):
    """How far one adapted layer moved. All are fractions without unit.

    Attributes:
        update_size: F_Δ, mean over tokens of ‖ΔW x‖ / ‖x‖ on held-out inputs of the base.
        drift: tr(ΔW M ΔWᵀ) / tr(W M Wᵀ), M a held-out preserve second moment of the base.
        drift_calibration: The same on the calibration moment; None without one.
        leakage: (d/r)·tr(Uᵀ M U)/tr(M), U an orthonormal basis of A's row space, M held out.
        relative_norm: ‖ΔW‖_F / ‖W‖_F.
    """

    update_size: float
    drift: float
    drift_calibration: float | None
    leakage: float
    relative_norm: float


class Movement(_Value):
    """Means over adapted layers, and each layer."""

    update_size: float
    drift: float
    drift_calibration: float | None
    leakage: float
    relative_norm: float
    layers: dict[str, LayerMovement]


class EvaluationReport(_Value):
    """Gain and retention of one adapter against its base; `scale` is the factor on ΔW."""

    items: tuple[ItemResult, ...]
    movement: Movement | None = None
    scale: float = 1.0
    seconds: float = 0.0
