"""The options of one training run, resolved: every default filled in, every value checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from forgetless.errors import TrainingError
from forgetless.models.hardware import has_fast_bf16
from forgetless.named import options_of
from forgetless.training.regularisers.base import Regulariser

Scheduler = Literal["cosine", "linear", "constant"]

# What changes no number of the trained weights, so that a run may be resumed with another value.
_REPORTING = frozenset({"learning_rate_source", "logging_steps", "save_steps", "report_to"})
_LATER = frozenset({"lora_plus_ratio", "regularisers"})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train.

    Attributes:
        learning_rate: Peak rate of AdamW.
        learning_rate_source: Where it comes from, for the record: `given`, or a paper.
        epochs: Passes over the train rows; the last may be partial.
        max_steps: Optimiser steps; overrides `epochs`.
        batch_size: Rows a forward pass.
        gradient_accumulation: Forward passes an optimiser step.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        warmup_ratio: Fraction of the steps in which the rate rises from 0; the last step is always
            behind it.
        weight_decay: Decoupled decay of every trainable adapter tensor. Their value at the base is
            0 in every form, so decay pulls to the base; the A of `plain` decays to 0 as well, which
            moves ΔW = B A towards 0 too.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        scheduler: The rate after warm-up.
        save_steps: Optimiser steps between two checkpoints.
        logging_steps: Optimiser steps between two logged losses.
        report_to: Integrations of transformers (`tensorboard`, `wandb`, …).
        bf16: Forward passes under bf16 autocast; None means where the hardware is fast at it.
        lora_plus_ratio: Rate of B over that of A, which is `learning_rate` (LoRA+,
            arXiv:2402.12354); None for one rate.
        regularisers: Terms beside the loss of the train rows.
    """

    learning_rate: float
    learning_rate_source: str = "given"
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scheduler: Scheduler = "cosine"
    save_steps: int = 50
    logging_steps: int = 5
    report_to: tuple[str, ...] = ()
    bf16: bool | None = None
    lora_plus_ratio: float | None = None
    regularisers: tuple[Regulariser, ...] = ()

    def __post_init__(self) -> None:
        _expect(0 < self.learning_rate < math.inf, "learning_rate", "above 0", self.learning_rate)
        _expect(0 < self.epochs < math.inf, "epochs", "above 0", self.epochs)
        for name in ("batch_size", "gradient_accumulation", "save_steps", "logging_steps"):
            value = asdict(self)[name]
            _expect(value >= 1, name, "at least 1", value)
        _expect(
            self.max_steps is None or self.max_steps >= 1, "max_steps", "at least 1", self.max_steps
        )
        _expect(0 <= self.warmup_ratio < 1, "warmup_ratio", "in 0..1", self.warmup_ratio)
        _expect(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _expect(self.max_grad_norm >= 0, "max_grad_norm", "at least 0", self.max_grad_norm)
        ratio = self.lora_plus_ratio
        _expect(ratio is None or 0 < ratio < math.inf, "lora_plus_ratio", "above 0", ratio)
        schedulers = get_args(Scheduler)
        _expect(self.scheduler in schedulers, "scheduler", " or ".join(schedulers), self.scheduler)

    def num_steps(self, rows: int) -> int:
        """Optimiser steps for that many train rows; the last batch of an epoch may be smaller."""
        if self.max_steps is not None:
            return self.max_steps
        batches = math.ceil(rows / self.batch_size)
        return math.ceil(self.epochs * math.ceil(batches / self.gradient_accumulation))

    def num_warmup_steps(self, rows: int) -> int:
        """Optimiser steps of warm-up for that many train rows; at least one step comes after them.

        The rate of the first step of a warm-up is 0: a run of one step would learn nothing in it.
        """
        steps = self.num_steps(rows)
        return min(math.ceil(self.warmup_ratio * steps), steps - 1)

    def uses_bf16(self, device: torch.device) -> bool:
        """Whether forward passes run under bf16 autocast on this device."""
        return has_fast_bf16(device) if self.bf16 is None else self.bf16

    def identity(self) -> Mapping[str, Any]:
        """The options that change the trained weights: a resumed run must have the same."""
        values = {k: v for k, v in asdict(self).items() if k not in _REPORTING | _LATER}
        # Where they are set only, so that checkpoints from before there were any go on.
        if self.lora_plus_ratio is not None:
            values["lora_plus_ratio"] = self.lora_plus_ratio
        if self.regularisers:
            named = sorted(self.regularisers, key=lambda one: one.name)
            values["regularisers"] = [*map(options_of, named)]
        return values


def _expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise TrainingError(f"training.{name}: expected {expected}, got {got}; change the recipe")
