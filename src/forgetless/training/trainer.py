"""TRL's SFTTrainer with the few changes that a run of forgetless needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from forgetless.errors import ArtefactError, ElsewhereError, TrainingError
from forgetless.models.placement import Sharding
from forgetless.processes import connected, lost_another
from forgetless.training.batches import BlankLast
from forgetless.training.checkpoint import write_started
from forgetless.training.loss import IGNORED, completion_loss, count_predicted
from forgetless.training.regularisers.base import Term
from forgetless.training.subject import Subject
from forgetless.training.terms import TermsAtWork

# Elements of the logits of one forward pass, 1 GiB in float32; TRL computes larger ones in tiles.
LARGEST_LOGITS = 2**28


@contextmanager
def _cause_of_a_failed_part() -> Iterator[None]:
    """A block that writes or reads a checkpoint in parts, and raises what failed in this process.

    torch.distributed.checkpoint wraps that, a process's exit included, in what is no `Exception`.

    Raises:
        ElsewhereError: Another process was stopped.
    """
    try:
        yield
    except CheckpointException as error:
        here, first = connected().rank, min(error.failures)
        cause, _ = error.failures.get(here, error.failures[first])
        if here not in error.failures and not isinstance(cause, Exception):
            raise ElsewhereError(f"process {first} was stopped while it saved or loaded") from error
        raise cause from error


class SubjectTrainer(SFTTrainer):
    """SFTTrainer that saves its subject alone, restores and decays all of it, prints nothing."""

    router_aux_loss_coef: float  # TRL sets it

    def __init__(
        self,
        subject: Subject,
        *,
        terms: Mapping[str, Term] | None = None,
        lora_plus_ratio: float | None = None,
        num_blank_rows: int = 0,
        **arguments: Any,
    ) -> None:
        """Take what trains, regularisers bound to it, and SFTTrainer's own arguments.

        The last `num_blank_rows` of the dataset fill up the last batch of each epoch.
        """
        super().__init__(model=subject.model, **arguments)
        self._subject = subject
        self._lora_plus_ratio = lora_plus_ratio
        self._num_blank_rows = num_blank_rows
        self._terms = TermsAtWork(terms or {})
        self.add_callback(self._terms)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    @property
    def sharding(self) -> Sharding | None:
        """What will leave each process but a part of the weights, if anything."""
        if self.is_fsdp_enabled:
            return "FSDP"
        return "DeepSpeed" if self.is_deepspeed_enabled else None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if not self._num_blank_rows:
            return super()._get_train_sampler(train_dataset)
        return BlankLast(len(self.train_dataset) - self._num_blank_rows, self._num_blank_rows)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The trainer's own; accelerate makes each epoch's order known to its own samplers only."""
        loader = super().get_train_dataloader()
        if self._num_blank_rows:
            loader.set_sampler(loader.batch_sampler.batch_sampler.sampler)
        return loader

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """The trainer's count, without blank rows."""
        learned_B1 = (inputs["labels"] != IGNORED).any(-1, keepdim=True)
        mask_BT = inputs["attention_mask"] * learned_B1
        super()._track_num_input_tokens({**inputs, "attention_mask": mask_BT})

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        """One forward and backward pass.

        Raises:
            TrainingError: The loss is NaN or inf.
        """
        loss = super().training_step(model, *arguments, **options)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.state.global_step + 1}: expected a finite loss, got {loss.item()}; "
                "lower training.learning_rate or look at the train rows of this step"
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the train rows, and while training the regularisers' terms."""
        loss = self._rows_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not model.training or not self._terms:
            return loss
        count = self.current_gradient_accumulation_steps
        stride = self.args.gradient_accumulation_steps
        extra = self._terms.loss(model, self.state.global_step, count, stride)
        # The trainer divides by `count` what no number of items has normalised.
        return loss + (extra if num_items_in_batch is not None else extra * count)

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        """The trainer's log, with the mean of each term since the last one."""
        super().log(logs | self._terms.means() if "loss" in logs else logs, *arguments)

    def _rows_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: Tensor | int | None,
    ) -> Any:
        """TRL's loss; on a CPU (or MPS) computed from the completion's positions only."""
        base = self._subject.causal
        count = count_predicted(inputs["labels"])
        elements = count * base.config.get_text_config().vocab_size
        if (
            return_outputs
            or self.aux_loss_enabled
            or self.accelerator.device.type not in {"cpu", "mps"}
            or self.accelerator.num_processes > 1  # the loss is scaled for the mean over processes
            or not 0 < elements <= LARGEST_LOGITS
        ):
            with nullcontext() if count else self._routing_unlearned():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        num_tokens = count if num_items_in_batch is None else num_items_in_batch
        return completion_loss(model, base.get_output_embeddings(), inputs, num_tokens)

    @contextmanager
    def _routing_unlearned(self) -> Iterator[None]:
        """Inside the block a mixture of experts learns nothing of where blank rows are sent."""
        coefficient, self.router_aux_loss_coef = self.router_aux_loss_coef, 0.0
        try:
            yield
        finally:
            self.router_aux_loss_coef = coefficient

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The trainer's own; with LoRA+ every B is in a group of its own rate."""
        optimizer = super().create_optimizer(model)
        if self._lora_plus_ratio is not None:
            named = (self.model if model is None else model).named_parameters()
            all_b = {id(parameter) for name, parameter in named if ".lora_B." in name}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in all_b]
                if moved:
                    group["params"] = [p for p in group["params"] if id(p) not in all_b]
                    rate = group["lr"] * self._lora_plus_ratio
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Every trainable tensor: decay pulls to the base, whatever a layer's name contains."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No model card beside checkpoints; the export writes one."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What trains, gathered where it is sharded: not the base, and frozen sides too."""
        if self.sharding is None:
            super().save_model(output_dir, _internal_call)
            return
        state = self._subject.in_one_piece()
        if self.args.should_save:
            self._save(output_dir, state)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """What trains alone: no tokenizer, no pickled arguments."""
        self._subject.save(
            Path(output_dir or self.args.output_dir),
            is_main_process=self.args.should_save,
            state_dict=state_dict,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            if self.is_world_process_zero():
                write_started(Path(self.args.output_dir), self.state.global_step)
            with _cause_of_a_failed_part():
                super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells a full disk so
            if isinstance(error, RuntimeError) and lost_another(error):
                raise
            raise ArtefactError(
                f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} could "
                f"not be written ({error}); free some space and run the same command again: it "
                "resumes from the last complete checkpoint"
            ) from error
        self.accelerator.wait_for_everyone()  # each has written a part: now it may be marked

    @_cause_of_a_failed_part()
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.sharding is None:  # else it was loaded before
            self._subject.load(Path(resume_from_checkpoint))
