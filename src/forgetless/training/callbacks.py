"""What is watched while the trainer runs: that every layer learns, finite numbers, progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.errors import TrainingError
from forgetless.training.checkpoint import write_marker
from forgetless.training.identity import RunIdentity


class CheckGradients(TrainerCallback):
    """Refuse a run in which an adapted layer learns nothing, or in which a gradient is not finite.

    A layer whose forward never calls its adapter (a quantised layer without support for it) would
    train nothing, silently.
    """

    # Exact zeros can be right once: a layer's queries, where every row is two tokens long.
    _PATIENCE = 3

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """Watch these adapted layers, by name."""
        self._layers = dict(layers)
        self._silent = set(layers)
        self._steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A layer without any trainable tensor is refused before the first step."""
        for name, parameters in self._trainable().items():
            if not parameters:
                raise TrainingError(f"layer {name}: trains nothing, it has no trainable tensor")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the gradients that the optimiser is about to use."""
        trainable = self._trainable()
        gradients = [p.grad for ps in trainable.values() for p in ps if p.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise TrainingError(
                f"step {state.global_step + 1}: expected finite gradients, got NaN or inf; lower "
                "training.learning_rate or look at the train rows of this step"
            )
        if not self._silent:
            return
        self._steps += 1
        for name in [name for name in self._layers if name in self._silent]:
            if any(p.grad is not None and bool(p.grad.any()) for p in trainable[name]):
                self._silent.remove(name)
        if self._silent and self._steps >= min(self._PATIENCE, state.max_steps):
            first = next(name for name in self._layers if name in self._silent)
            raise TrainingError(
                f"layer {first}: trains nothing, its gradient is zero "
                f"({len(self._silent)} of {len(self._layers)} adapted layers); its type may not "
                "support this form: use a method that trains `a` or `b`, or leave it out of targets"
            )

    def _trainable(self) -> dict[str, list[nn.Parameter]]:
        """Looked up anew: FSDP puts others in place of those that it shards."""
        return {
            name: [p for p in layer.parameters() if p.requires_grad]
            for name, layer in self._layers.items()
        }


class MarkCheckpoints(TrainerCallback):
    """Declare each checkpoint complete once the trainer has written all of it."""

    def __init__(self, folder: Path, identity: RunIdentity, resumed_from: tuple[int, ...]) -> None:
        """Mark checkpoints in `folder` as those of this run."""
        self._folder = folder
        self._identity = identity
        self._resumed_from = resumed_from

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log where a checkpoint is taken: the running mean of the loss is not part of it."""
        if control.should_save:
            control.should_log = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the marker, last of all."""
        if state.is_world_process_zero:
            write_marker(
                self._folder / f"checkpoint-{state.global_step}",
                self._identity,
                step=state.global_step,
                resumed_from=self._resumed_from,
            )


class ReportSteps(TrainerCallback):
    """Tell how far training is: `advance(steps done, steps in all)`."""

    def __init__(
        self,
        advance: Callable[[int, int], None],
        *,
        resumed: Callable[[int], None] | None = None,
    ) -> None:
        """Call `advance` at the start, where a resumed run stands, and after each step.

        `resumed` hears of that step before the first new one, and of nothing in a run from 0.
        """
        self._advance, self._resumed = advance, resumed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show where a resumed run stands."""
        if state.global_step and self._resumed is not None:
            self._resumed(state.global_step)
        self._advance(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show one more step."""
        self._advance(state.global_step, state.max_steps)
