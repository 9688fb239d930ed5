"""Watch retention while any Trainer trains, and stop it at a bound that the user names.

Every `every` steps the model is compared with its own base (adapters disabled) on a small preserve
set, outside autocast, in the precision of its weights, and left exactly as it was found.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from forgetless.data.loading import load_rows
from forgetless.data.rows import RowSet
from forgetless.data.spec import DataInput, parse_data
from forgetless.data.tokens import TokenRow, tokenize
from forgetless.errors import ForgetlessWarning, TrainingError
from forgetless.evaluation.likelihood import compare_rows
from forgetless.evaluation.movement import measure_movement
from forgetless.models.state import left_as_found, random_state_kept, trainable_copy
from forgetless.training.identity import active_adapter
from forgetless.training.initialize import tokenizer_of
from forgetless.training.sft import learnable

PREFIX = "eval_retention_"  # reporters put what begins with eval_ beside other evaluations


@dataclass(frozen=True, slots=True)
class RetentionPoint:
    """What is kept of the base at one step, on the monitor's preserve set.

    Attributes:
        step: Optimizer steps done.
        kl: KL(base‖tuned), nats a token.
        ce_rise: Cross-entropy of the tuned model less that of the base, nats a token.
        drift: tr(ΔW M ΔWᵀ) / tr(W M Wᵀ), averaged over adapted layers.
    """

    step: int
    kl: float
    ce_rise: float
    drift: float


class MonitorRetention(TrainerCallback):
    """Log what is kept while training, and stop at a bound.

        trainer.add_callback(forgetless.MonitorRetention(trainer, "keep.jsonl", max_kl=0.05))

    Logged as `eval_retention_kl`, `eval_retention_ce_rise` and `eval_retention_drift`, through the
    Trainer's own log to whatever `report_to` names, and kept in `history`. A figure above its
    bound, or one that is not finite, ends training at that step. With `rollback`, a copy in memory
    of the trainable tensors at the last measurement within the bounds is put back then; the
    optimizer's state is not, and checkpoints written in between stay as they are. Without bounds,
    training ends with the same weights, bit for bit, as without the monitor.
    """

    def __init__(
        self,
        trainer: Trainer,
        preserve_data: DataInput,
        *,
        every: int = 50,
        rows: int = 64,
        max_kl: float | None = None,
        max_ce_rise: float | None = None,
        max_drift: float | None = None,
        rollback: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        cache: Path | str | None = None,
    ) -> None:
        """Load the preserve set.

        Args:
            trainer: The trainer that this is added to; its model must have an adapter when it
                begins to train.
            preserve_data: What must not be forgotten, as for `attach`; best rows that no method was
                calibrated on.
            every: Optimizer steps from one measurement to the next; the last step is measured too.
            rows: Most rows of each data spec to measure on; three forward passes of them each time.
            max_kl: Bound on KL(base‖tuned), nats a token.
            max_ce_rise: Bound on the rise of cross-entropy, nats a token.
            max_drift: Bound on the drift.
            rollback: At a bound, go back to the last measured weights within it.
            tokenizer: The model's, where the trainer has no `processing_class`.
            batch_size: Rows a forward pass.
            cache: Folder to keep `self` samples in.

        Raises:
            ForgetlessError: Data that cannot be read, or options that do not fit together.
        """
        bounds = {"kl": max_kl, "ce_rise": max_ce_rise, "drift": max_drift}
        self._bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        _check_options(every, rows, self._bounds, rollback)
        self._trainer = trainer
        self._tokenizer = tokenizer_of(trainer, tokenizer)
        self._every = every
        self._rollback = rollback
        self._batch_size = batch_size
        folder = Path(cache) if cache is not None else None
        self._row_sets: list[RowSet] = []
        self._tokens: list[TokenRow] = []
        with random_state_kept():
            for spec in parse_data(preserve_data):
                loaded = load_rows(spec, self._tokenizer, model=trainer.model, cache=folder)
                self._row_sets.append(RowSet(spec, loaded.rows[:rows]))
                self._tokens += tokenize(self._row_sets[-1], self._tokenizer)
        self._tokens = learnable(self._tokens, "monitor")
        self.history: list[RetentionPoint] = []
        self._within: tuple[int, dict[str, Tensor]] | None = None
        self._stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure where training begins; a resumed run may be anywhere.

        Raises:
            TrainingError: No single adapter, a sharded model, or a start beyond a bound.
        """
        if self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled:
            raise TrainingError(
                "monitor: expected a model in one piece, got one that FSDP or DeepSpeed may shard; "
                "take the monitor out, and evaluate afterwards"
            )
        self._stopped = False
        self._within = None
        beyond = self._beyond(self._measure(state, control))
        if beyond:
            raise TrainingError(
                f"monitor: expected a start within the bounds, got {beyond} at step "
                f"{state.global_step}; raise the bound, or resume from an earlier checkpoint"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure where it is due, and stop beyond a bound."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        if not last and state.global_step % self._every:
            return
        beyond = self._beyond(self._measure(state, control))
        if beyond:
            control.should_training_stop = True
            self._stop(beyond, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Hold the bounds at the very end too: the trainer may have loaded its best checkpoint.

        Reporters are closed by now, so that this measurement is in `history` only.
        """
        if not self._bounds:
            return
        if args.load_best_model_at_end or self.history[-1].step != state.global_step:
            beyond = self._beyond(self._measure(state, None))
            if beyond:
                self._stop(beyond, state.global_step)

    def _measure(self, state: TrainerState, control: TrainerControl | None) -> RetentionPoint:
        """Compare with the base now; logged unless `control` is None."""
        model = self._model()
        with random_state_kept(), left_as_found(model), torch.no_grad():
            model.eval()
            base, tuned, kl_sum = compare_rows(
                model, self._tokenizer, self._tokens, batch_size=self._batch_size
            )
            finite = math.isfinite(kl_sum.sum())
            drift = self._drift(model) if finite else math.nan
        count = float(base.num_tokens.sum())
        point = RetentionPoint(
            step=state.global_step,
            kl=float(kl_sum.sum()) / count,
            ce_rise=float(tuned.nll_sum.sum() - base.nll_sum.sum()) / count,
            drift=drift,
        )
        self.history.append(point)
        if control is not None:
            self._log(point, control)
        if self._rollback and not self._beyond(point):
            self._within = (state.global_step, trainable_copy(model))
        return point

    def _drift(self, model: PeftModel) -> float:
        adapter = active_adapter(model)
        return measure_movement(model, self._tokenizer, self._row_sets, adapter=adapter).drift

    def _model(self) -> PeftModel:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        if not isinstance(model, PeftModel):
            raise TrainingError(
                f"monitor: expected a PeftModel, whose base is the reference, got "
                f"{type(model).__name__}; call forgetless.attach or initialize first"
            )
        return model

    def _log(self, point: RetentionPoint, control: TrainerControl) -> None:
        """Log as Trainer does; TRL's own `log` would empty its running means of the step."""
        due = control.should_log
        Trainer.log(
            self._trainer,
            {
                f"{PREFIX}kl": point.kl,
                f"{PREFIX}ce_rise": point.ce_rise,
                f"{PREFIX}drift": point.drift,
            },
        )
        control.should_log = due  # logging takes it back, and the step's own log is still to come

    def _beyond(self, point: RetentionPoint) -> str:
        """The figures beyond their bounds, in words; empty where there are none."""
        values = {"kl": point.kl, "ce_rise": point.ce_rise, "drift": point.drift}
        return ", ".join(
            f"{name} {values[name]:.4g} above max_{name}={bound:g}"
            for name, bound in self._bounds.items()
            if not values[name] <= bound  # NaN is beyond every bound
        )

    def _stop(self, beyond: str, step: int) -> None:
        """Say it once, and go back where that is wanted."""
        told, self._stopped = self._stopped, True
        kept = "the weights stay as they are"
        if self._rollback and self._within is not None:
            within_step, tensors = self._within
            parameters = dict(self._model().named_parameters())
            with torch.no_grad():
                for name, tensor in tensors.items():
                    parameters[name].copy_(tensor)
            kept = f"the weights are those of step {within_step} again"
        if not told:
            warnings.warn(
                f"monitor: {beyond} at step {step}: training stops, {kept}",
                ForgetlessWarning,
                stacklevel=2,
            )


def _check_options(every: int, rows: int, bounds: dict[str, float], rollback: bool) -> None:
    if every < 1 or rows < 1:
        raise TrainingError(
            f"monitor: expected every and rows of 1 or more, got {every} and {rows}"
        )
    for name, bound in bounds.items():
        if not bound >= 0:
            raise TrainingError(f"monitor: max_{name}: expected 0 or more, got {bound}")
    if rollback and not bounds:
        raise TrainingError(
            "monitor: rollback needs a bound to go back from; give max_kl, max_ce_rise or max_drift"
        )
