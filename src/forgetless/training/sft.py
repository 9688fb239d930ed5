"""Train an adapter, or every weight, on tokenised rows, with TRL's SFTTrainer.

The loss is the mean negative log-likelihood over the completion tokens of all rows of an optimiser
step, however they are split into forward passes. The base model and its forward are left as they
were found; a run that was killed goes on from its last complete checkpoint and ends with the same
weights as one that was not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from forgetless.data.tokens import (
    TokenRow,
    fingerprint_token_rows,
    has_target,
    pad_token_id,
)
from forgetless.errors import ArtefactError, ForgetlessWarning, TrainingError
from forgetless.evaluation.likelihood import score_rows
from forgetless.models.pair import TunedModel, TunedPair
from forgetless.models.placement import Sharding, is_sharded
from forgetless.models.state import left_as_found
from forgetless.processes import connected
from forgetless.training.batches import blank_rows, share_of_batch
from forgetless.training.callbacks import CheckGradients, MarkCheckpoints
from forgetless.training.checkpoint import Marker, resume_point, sharding_of, trained_state
from forgetless.training.full import FullSubject
from forgetless.training.identity import identity_of
from forgetless.training.loss import IGNORED
from forgetless.training.options import TrainingOptions
from forgetless.training.quiet import libraries_quiet
from forgetless.training.regularisers.base import Binding, PreserveData
from forgetless.training.restore import training_undone
from forgetless.training.results import LogPoint, TrainingFacts
from forgetless.training.subject import AdapterSubject, Subject
from forgetless.training.terms import LOGGED
from forgetless.training.trainer import SubjectTrainer

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def train(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[TokenRow],
    *,
    options: TrainingOptions,
    output: Path,
    seed: int,
    start: str | None = None,
    preserve: PreserveData | None = None,
    validation_rows: Sequence[TokenRow] = (),
    callbacks: Iterable[TrainerCallback] = (),
) -> TrainingFacts:
    """Train what a model holds; goes on from the last complete checkpoint in `output`.

    Args:
        model: An attached model with one active adapter, as it is at step 0; or a pair, of which
            every weight of the tuned model trains.
        tokenizer: For the padding token; it is not changed.
        train_rows: Tokenised rows; those without a completion token teach nothing and are left out.
        options: How to train.
        output: Folder of the checkpoints, of this run only.
        seed: Seeds the order of the rows.
        start: What the adapter's start follows from (`Attached.origin`), to tell runs apart.
        preserve: What must be kept, for the regularisers among the options.
        validation_rows: Rows to score with the trained model; never trained on.
        callbacks: Further callbacks of transformers, such as `ReportSteps`.

    Raises:
        TrainingError: Nothing to train on or to validate with, a batch that the processes of this
            run cannot divide, a layer that trains nothing, a loss that is not finite.
        ArtefactError: `output` holds a checkpoint of another run or program, or cannot be written.

    Warns:
        ForgetlessWarning: The adapter did not move.
    """
    subject = _subject_of(model, options)
    device = subject.causal.device
    refuse_data_parallel()
    processes = connected()
    kept = preserve or PreserveData()
    for regulariser in options.regularisers:
        regulariser.check_form(subject.form)
    rows = mixed_rows(train_rows, options, kept, seed)
    if validation_rows:
        learnable(validation_rows, "validation data")
    data = fingerprint_token_rows(rows)
    if any(regulariser.needs_preserve for regulariser in options.regularisers):
        data += f"+{fingerprint_token_rows(kept.rows)}"
    described = subject.described(start)
    identity = identity_of(described, device, data=data, options=options, seed=seed)
    point = processes.by_main(lambda: resume_point(output, identity))
    resumed_from = () if point is None else point[1].resumed_from
    if point is not None and point[1].step >= options.num_steps(len(rows)):
        # The trainer would take one more step where the run ended within an epoch.
        subject.load(point[0])
        state = trained_state(point[0])
    else:
        if point is not None:
            resumed_from = (*resumed_from, point[1].step)
        watchers = [
            CheckGradients(subject.watched()),
            MarkCheckpoints(output, identity, resumed_from),
            *subject.callbacks(options),
        ]
        binding = Binding(model, subject.adapter, kept, tokenizer, seed)
        with training_undone(subject.model), libraries_quiet():
            blank = blank_rows(len(rows), options.batch_size, processes, pad_token_id(tokenizer))
            trainer = SubjectTrainer(
                subject,
                num_blank_rows=len(blank),
                lora_plus_ratio=options.lora_plus_ratio,
                terms={one.name: one.bind(binding) for one in options.regularisers},
                args=_arguments(
                    subject,
                    options,
                    output,
                    seed=seed,
                    num_rows=len(rows),
                    batch_size=share_of_batch(options.batch_size, processes),
                ),
                train_dataset=_dataset([*rows, *blank]),
                data_collator=DataCollatorForLanguageModeling(pad_token_id(tokenizer)),
                processing_class=tokenizer,
                callbacks=[*watchers, *callbacks],
            )
            subject.made_ready()
            if point is not None:
                _refuse_other_sharding(*point, trainer.sharding)
            if trainer.sharding is not None:
                for regulariser in options.regularisers:
                    regulariser.check_sharding(trainer.sharding)
                _prepare_to_shard(trainer, subject, None if point is None else point[0])
            with _launcher_heard():
                trainer.train(resume_from_checkpoint=None if point is None else str(point[0]))
            state = trainer.state
    in_parts = is_sharded(subject.model)
    if not in_parts:
        _warn_if_unmoved(subject, state.global_step)
    return TrainingFacts(
        learning_rate=options.learning_rate,
        learning_rate_source=options.learning_rate_source,
        steps=state.global_step,
        epochs=state.epoch,
        tokens=state.num_input_tokens_seen,
        trainable_parameters=sum(p.numel() for p in subject.model.parameters() if p.requires_grad),
        resumed_from=list(resumed_from),
        curve=_curve(state),
        validation_nll=mean_nll(model, tokenizer, validation_rows)
        if validation_rows and not in_parts
        else None,
    )


def _subject_of(model: TunedModel, options: TrainingOptions) -> Subject:
    return FullSubject(model, options) if isinstance(model, TunedPair) else AdapterSubject(model)


def mixed_rows(
    train_rows: Sequence[TokenRow], options: TrainingOptions, preserve: PreserveData, seed: int
) -> list[TokenRow]:
    """What is trained on: the train rows that have something to learn, and what is replayed.

    Raises:
        TrainingError: Nothing to train on, or nothing to replay.
    """
    rows = learnable(train_rows)
    for regulariser in options.regularisers:
        rows = regulariser.train_rows(rows, preserve, seed)
    return rows


def learnable(rows: Sequence[TokenRow], where: str = "train data") -> list[TokenRow]:
    """Rows that have a token to learn: one of the completion, with a token before it.

    Raises:
        TrainingError: There are none.
    """
    found = [row for row in rows if has_target(row)]
    if not found:
        raise TrainingError(
            f"{where}: expected rows with a completion, got none in {len(rows)} rows; give rows, "
            "or raise max_length where they are truncated"
        )
    return found


def mean_nll(
    model: TunedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow]
) -> float:
    """Mean negative log-likelihood per completion token, nats, in evaluation mode.

    Rows without a completion token do not count.

    Raises:
        TrainingError: No row has one.
    """
    rows = learnable(rows, "validation data")
    with left_as_found(model):
        model.eval()
        scores = score_rows(model, tokenizer, rows)
    return float(scores.nll_sum.sum() / scores.num_tokens.sum())


def refuse_data_parallel() -> None:
    """Refuse several visible GPUs in one process: TRL does not work with nn.DataParallel.

    Raises:
        TrainingError: More than one GPU, and no distributed launcher.
    """
    if torch.cuda.device_count() > 1 and not torch.distributed.is_torchelastic_launched():
        raise TrainingError(
            f"training: expected one visible GPU, got {torch.cuda.device_count()}; set "
            "CUDA_VISIBLE_DEVICES=0, or use them all: "
            f"torchrun --nproc-per-node {torch.cuda.device_count()} -m forgetless run ..."
        )


def _dataset(rows: Sequence[TokenRow]) -> Dataset:
    """Columns that TRL takes as they stand: no templating, no truncation, no EOS of its own."""
    # The first token has nothing before it, and would count as one of the tokens to average over.
    masked = [max(row.prompt_length, 1) for row in rows]
    return Dataset.from_dict(
        {
            "input_ids": [list(row.input_ids) for row in rows],
            "labels": [
                [IGNORED] * first + list(row.input_ids[first:])
                for row, first in zip(rows, masked, strict=True)
            ],
        }
    )


def _refuse_other_sharding(checkpoint: Path, marker: Marker, sharding: Sharding | None) -> None:
    """Refuse to go on from an optimiser's state that would not be found.

    Raises:
        ArtefactError: Names both ways.
    """
    before = sharding_of(marker)
    if before != sharding:
        raise ArtefactError(
            f"{checkpoint}: expected the optimiser of a model that {sharding or 'nothing'} shards, "
            f"got one that {before or 'nothing'} has sharded; go on with the launcher's settings "
            "of before, or give another output folder"
        )


def _prepare_to_shard(trainer: SubjectTrainer, subject: Subject, resumed: Path | None) -> None:
    """Do what can only be done while the model is whole.

    Raises:
        TrainingError: FSDP's first version, or a subject that cannot be sharded.
    """
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise TrainingError(
            "training: expected version 2 of FSDP, got 1, whose flat parameters are not "
            "supported here; set fsdp_version: 2 in accelerate's configuration"
        )
    subject.in_one_piece()
    if trainer.is_deepspeed_enabled:
        trainer.remove_callback(CheckGradients)  # it keeps gradients to itself
    if resumed is not None:
        subject.load(resumed)


@contextmanager
def _launcher_heard() -> Iterator[None]:
    """Say in one line where DeepSpeed's configuration and the run's options contradict.

    Raises:
        TrainingError: It names both values.
    """
    try:
        yield
    except ValueError as error:
        if "DeepSpeed config" not in str(error):
            raise
        raise TrainingError(f"training: {' '.join(str(error).split())}") from error


def _arguments(
    subject: Subject,
    options: TrainingOptions,
    output: Path,
    *,
    seed: int,
    num_rows: int,
    batch_size: int,
) -> SFTConfig:
    device = subject.causal.device
    return SFTConfig(
        output_dir=str(output),
        max_steps=options.num_steps(num_rows),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        # The old name and the new one: TRL turns the old one on by default.
        gradient_checkpointing=options.gradient_checkpointing,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch",
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES[options.scheduler],
        warmup_steps=options.num_warmup_steps(num_rows),
        weight_decay=subject.optimiser_decay(options),
        max_grad_norm=options.max_grad_norm,
        bf16=options.uses_bf16(device),
        use_cpu=device.type == "cpu",
        seed=seed,
        logging_steps=options.logging_steps,
        # A loss that is not finite is an error of ours; the filter would hide it from the curve.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=options.save_steps,
        # The one before stays until the newest is marked complete.
        save_total_limit=2,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        dataset_kwargs={"skip_prepare_dataset": True},
        completion_only_loss=False,
        max_length=None,
        packing=False,
    )


def _curve(state: TrainerState) -> list[LogPoint]:
    return [_point(entry) for entry in state.log_history if "loss" in entry]


def _point(entry: Mapping[str, Any]) -> LogPoint:
    terms = {k.removeprefix(LOGGED): v for k, v in entry.items() if k.startswith(LOGGED)}
    return LogPoint(
        step=entry["step"],
        loss=entry["loss"] - sum(terms.values()),
        learning_rate=entry["learning_rate"],
        grad_norm=entry.get("grad_norm"),
        terms=terms,
    )


def _warn_if_unmoved(subject: Subject, steps: int) -> None:
    """Warn where every trainable tensor is what it was before the first step."""
    if not subject.has_moved():
        warnings.warn(
            f"training: {subject.noun} did not move in {steps} steps, so that the tuned model is "
            "the base model; raise training.learning_rate or train for more steps",
            ForgetlessWarning,
            stacklevel=3,
        )
