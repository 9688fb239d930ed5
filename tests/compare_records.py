"""Records of a made-up world whose answers are known: gains, losses, update sizes, seeds, rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forgetless.evaluation.pairing import divergence, paired
from forgetless.evaluation.results import EvaluationReport, ItemResult, Movement
from forgetless.experiments.record import Record
from report_records import record

RATES = (2e-4, 5e-4, 1e-3, 2e-3)
ROWS = 120


@dataclass(frozen=True)
class World:
    """What is true of each method.

    Attributes:
        slope: log KL on log F_Δ.
        seed_noise: Standard deviation of log KL over seeds, common to the methods of one seed.
        own_noise: The same, of each run by itself.
        row_noise: Of a row's KL, as a factor; the same rows are hard for all.
        validated: Whether runs keep rows for validation.
    """

    slope: float = 2.0
    seed_noise: float = 0.0
    own_noise: float = 0.05
    row_noise: float = 0.5
    validated: bool = True
    rows: int = ROWS
    draw: int = 0
    scales: tuple[float, ...] = field(default=(0.25, 0.5, 0.75))

    def records(
        self,
        arms: Mapping[str, dict[str, Any]],
        *,
        rates: tuple[float, ...] = RATES,
        seeds: tuple[int, ...] = (0, 1, 2),
    ) -> list[Record]:
        """One record for each arm, rate and seed. Keys of an arm: see `one`."""
        return [
            self.one(name, rate, seed, **options)
            for name, options in arms.items()
            for rate in rates
            for seed in seeds
        ]

    def one(
        self,
        name: str,
        rate: float,
        seed: int,
        *,
        method: str = "lora",
        factor: float = 1.0,
        size: float = 1.0,
        gain: float = 1.0,
        best: float = 1e-3,
        recipe: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        scaled: bool = False,
    ) -> Record:
        """One run: KL is `factor` times what the law says for its F_Δ, which goes with the rate."""
        key = sum(map(ord, name))
        own = np.random.default_rng([self.draw, key, seed, round(rate * 1e6)])
        shared = np.random.default_rng([self.draw, seed, 77])
        moved = 300 * rate * size
        noise = own.normal(0, self.own_noise) + shared.normal(0, self.seed_noise)
        lost = factor * moved**self.slope * math.exp(noise)
        # Gains rise up to the best rate and fall behind it.
        learned = gain * (1 - 0.3 * math.log(rate / best) ** 2 / math.log(10) ** 2)
        learned += own.normal(0, 0.002)
        training = {"learning_rate": rate, "epochs": 1.0, **(recipe or {})}
        base = record(name, method, ())
        return base.model_copy(
            update={
                "seed": seed,
                "model": base.model.model_copy(update={"dtype": "float32"}),
                "method": {"name": method, "rank": 32, **(options or {})},
                "recipe": {**base.recipe, "training": training, "seed": seed},
                "training": base.training.model_copy(
                    update={
                        "learning_rate": rate,
                        "validation_nll": 2 - learned if self.validated else None,
                    }
                ),
                "evaluation": self.report(learned, lost, moved, 1.0),
                "scaled": [self.report(learned, lost, moved, s) for s in self.scales if scaled],
            }
        )

    def report(self, learned: float, lost: float, moved: float, scale: float) -> EvaluationReport:
        """Gain falls short of linear in the scale, KL goes with its square."""
        rows = np.random.default_rng([self.draw, 5])
        hard = np.exp(rows.normal(0, self.row_noise, self.rows) - self.row_noise**2 / 2)
        easy = rows.normal(1, 0.3, self.rows)
        tokens = rows.integers(5, 30, self.rows).astype(float)
        before = 2 + rows.normal(0, 0.3, self.rows)
        after = before - learned * (1 - (1 - scale) ** 2) * easy
        items = (
            _item("task", "gain", nll=paired("nll", before, after, tokens)),
            _item("facts", "retention", kl=divergence(lost * scale**2 * hard, tokens)),
        )
        size = moved * scale
        movement = Movement(
            update_size=size,
            drift=size**2,
            drift_calibration=None,
            leakage=1.0,
            relative_norm=size,
            layers={},
        )
        return EvaluationReport(items=items, movement=movement, scale=scale)


def _item(name: str, side: str, **found: Any) -> ItemResult:
    return ItemResult.model_validate(
        {
            "name": name,
            "side": side,
            "rows": ROWS,
            "truncated_rows": 0,
            "metrics": {metric: one.result for metric, one in found.items()},
            "row_values": {metric: one.by_row for metric, one in found.items()},
        }
    )
