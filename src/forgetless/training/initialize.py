"""`initialize`: start an adapter on a trainer that is built already, before its `.train()`.

A trainer makes its optimizer when training begins, so that until then the tensors that train may
still be replaced: an adapter that the trainer made from a LoraConfig is started anew in place, and
a trainer without an adapter gets one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer

from forgetless.adapters.arguments import check_arguments, parse_bytes
from forgetless.adapters.attach import attach_rows
from forgetless.adapters.forms import adapted_layers, align_adapter_dtype
from forgetless.adapters.in_place import check_startable
from forgetless.adapters.peft_layers import refuse_unholdable
from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.calibration.gradients import collect_gradients
from forgetless.data.loading import load_rows
from forgetless.data.overlap import refuse_overlap
from forgetless.data.rows import Row, RowSet
from forgetless.data.spec import DataInput, DataSpec, SourceWeights, Tokens, parse_data
from forgetless.data.tokens import Batch, pad_token_id
from forgetless.errors import AdapterError, MethodError, TrainingError
from forgetless.methods import MethodInput, make_method
from forgetless.methods.base import Method, Role
from forgetless.models.state import random_state_kept
from forgetless.models.targets import find_targets
from forgetless.processes import connected
from forgetless.training.identity import active_adapter
from forgetless.training.trainer_rows import TrainedRow, calibration_batches, trained_rows


def initialize(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: MethodInput = "lora-null",
    rank: int | None = None,
    preserve_data: DataInput | None = None,
    train_rows: int = 512,
    tokens: Tokens = "all",
    targets: Sequence[str] | None = None,
    source_weights: SourceWeights = "tokens",
    batch_size: int = 8,
    min_tokens: int | None = None,
    memory_budget: int | str | None = None,
    cache: Path | str | None = None,
    seed: int = 0,
) -> PeftModel:
    """Calibrate, and start an adapter on the model of a trainer that has not trained yet.

    Works on transformers' Trainer and on TRL's SFTTrainer and DPOTrainer. Train data, where the
    method needs them, are the trainer's own, as its collator gives them. Random states stay as they
    were, so that training draws what it would have drawn without this call.

    Args:
        trainer: Built, not trained. An adapter that it holds must be an ordinary LoRA without an
            update: it keeps its layers, rank and alpha, and gets the method's start. A trainer
            without an adapter gets one, under the name `default`.
        tokenizer: Its tokenizer, where the trainer has no `processing_class`.
        method: A name, or a mapping of a name and options; `forgetless methods` lists them.
        rank: Shorthand for the method's option; that of the trainer's adapter where it has one.
        preserve_data: What must not be forgotten, as for `attach`.
        train_rows: Most rows of the trainer's data to calibrate on, drawn with `seed`.
        tokens: Which tokens of the trainer's data count: `all` but padding, or those that its loss
            looks at (`completion`).
        targets: Layers of a new adapter, as for `attach`.
        source_weights: How several sources of preserve data count, as for `attach`.
        batch_size: Rows in a calibration forward pass.
        min_tokens: Fewest preserve tokens to accept, in place of the widest site's width.
        memory_budget: Bytes that second moments of preserve data may take at a time, as for
            `attach`.
        cache: Folder to keep second moments of preserve data and `self` samples in.
        seed: Seed of random starts and of the draw of train rows.

    Returns:
        The trainer's model.

    Raises:
        ForgetlessError: A trainer that has an optimizer or shards its model, or whatever `attach`
            refuses; the message says what to do.
    """
    _refuse_unready(trainer)
    tokenizer = tokenizer_of(trainer, tokenizer)
    folder = Path(cache) if cache is not None else None
    existing = active_adapter(trainer.model) if isinstance(trainer.model, PeftModel) else None
    adapter = existing or "default"
    check_arguments(
        trainer.model,
        tokenizer,
        source_weights=source_weights,
        batch_size=batch_size,
        min_tokens=min_tokens,
        cache=folder,
        adapter=adapter,
        seed=seed,
        in_place=existing is not None,
    )
    budget = parse_bytes(memory_budget, "memory_budget")
    if existing is not None:
        targets = _layers_of(trainer.model, existing, targets)
        rank = _rank_of(trainer.model, existing, method, rank)
    made = make_method(method, rank)
    if existing is not None:
        check_startable(trainer.model, made, existing)
    else:
        refuse_unholdable(trainer.model, made, find_targets(trainer.model, targets).targets)
    with random_state_kept():
        row_sets, collected, gradients = _load(
            trainer,
            tokenizer,
            made,
            preserve_data,
            targets=targets,
            train_rows=train_rows,
            tokens=tokens,
            batch_size=batch_size,
            cache=folder,
            seed=seed,
        )
        model = attach_rows(
            trainer.model,
            tokenizer,
            method=made,
            row_sets=row_sets,
            collected=collected,
            gradients=gradients,
            targets=targets,
            source_weights=source_weights,
            batch_size=batch_size,
            min_tokens=min_tokens,
            memory_budget=budget,
            cache=folder,
            adapter=adapter,
            seed=seed,
            processes=connected(),
        ).model
    # TRL casts the trainable tensors of quantised models, and only those.
    align_adapter_dtype(model, adapter)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
    return model


def tokenizer_of(
    trainer: Trainer, given: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer given, else the trainer's own.

    Raises:
        TrainingError: Neither.
    """
    own = trainer.processing_class if given is None else given
    if isinstance(own, ProcessorMixin):
        own = own.tokenizer
    if not isinstance(own, PreTrainedTokenizerBase):
        raise TrainingError(
            f"trainer: expected a tokenizer as its processing_class, got {type(own).__name__}; "
            "pass tokenizer="
        )
    return own


def _refuse_unready(trainer: object) -> None:
    """Refuse a trainer that would train other tensors than those started here."""
    if not isinstance(trainer, Trainer):
        raise TrainingError(
            f"initialize: expected a transformers or TRL trainer, got {type(trainer).__name__}; "
            "in a loop of your own call forgetless.attach(model, tokenizer, ...)"
        )
    if trainer.optimizer is not None or trainer.is_in_train:
        raise TrainingError(
            "initialize: expected a trainer that has no optimizer yet, got one that would go on "
            "with the tensors of before; call it between the trainer's construction and .train(), "
            "without optimizers=, or call forgetless.attach before the trainer"
        )
    if trainer.model_init is not None:
        raise TrainingError(
            "initialize: expected a trainer with a model, got model_init, which makes a new model "
            "in .train(); pass model=, or call forgetless.attach inside model_init"
        )
    if (
        trainer.model_wrapped is not trainer.model
        or trainer.is_fsdp_enabled
        or trainer.is_deepspeed_enabled
    ):
        raise TrainingError(
            "initialize: expected a model in one piece, got a trainer that wraps or shards it; "
            "call forgetless.attach before the trainer"
        )


def _layers_of(model: PeftModel, adapter: str, targets: Sequence[str] | None) -> list[str]:
    if targets is not None:
        raise AdapterError(
            f"targets: expected none, as the trainer's adapter {adapter!r} has its layers already; "
            "set target_modules in its LoraConfig"
        )
    return list(adapted_layers(model, adapter))


def _rank_of(model: PeftModel, adapter: str, method: MethodInput, rank: int | None) -> int | None:
    """The adapter's rank, where neither the method nor `rank` names one."""
    named = isinstance(method, Method) or (isinstance(method, Mapping) and "rank" in method)
    return rank if rank is not None or named else int(model.peft_config[adapter].r)


def _load(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    preserve_data: DataInput | None,
    *,
    targets: Sequence[str] | None,
    train_rows: int,
    tokens: Tokens,
    batch_size: int,
    cache: Path | None,
    seed: int,
) -> tuple[dict[Role, list[RowSet]], dict[Role, SiteMoments], dict[str, Tensor]]:
    """Preserve rows, and what the method needs of the trainer's own: moments, the gradient."""
    row_sets: dict[Role, list[RowSet]] = {}
    collected: dict[Role, SiteMoments] = {}
    gradients: dict[str, Tensor] = {}
    if "preserve" in method.needs:
        if preserve_data is None:
            raise MethodError(f"method {method.name} needs preserve data: pass preserve_data")
        row_sets["preserve"] = [
            load_rows(spec, tokenizer, model=trainer.model, cache=cache)
            for spec in parse_data(preserve_data)
        ]
    if "train" in method.reads:
        if train_rows < 1:
            raise TrainingError(f"train_rows: expected 1 or more, got {train_rows}")
        rows = trained_rows(trainer, limit=train_rows, batch_size=batch_size, seed=seed)
        refuse_overlap(
            {"preserve": row_sets.get("preserve", []), "train": [_as_text(rows, tokenizer)]}
        )
        chosen = find_targets(trainer.model, targets).targets
        padding = pad_token_id(tokenizer)

        def batches(taken: Sequence[TrainedRow], which: Tokens) -> Iterator[Batch]:
            return calibration_batches(
                taken, batch_size=batch_size, pad_token_id=padding, tokens=which
            )

        if "train" in method.needs:
            collected["train"] = collect_moments(
                trainer.model, chosen, batches(rows, tokens), processes=connected()
            )
        if method.rows_for_gradient:
            first = rows[: method.rows_for_gradient]
            gradients = collect_gradients(trainer.model, chosen, batches(first, "completion"))
    return row_sets, collected, gradients


def _as_text(rows: Sequence[TrainedRow], tokenizer: PreTrainedTokenizerBase) -> RowSet:
    """The trainer's rows as preserve rows may have them: plain, and as chat templates write."""
    ids = [row.input_ids_T for row in rows]
    texts = [
        *tokenizer.batch_decode(ids, skip_special_tokens=True),
        *tokenizer.batch_decode(ids, skip_special_tokens=False),
    ]
    return RowSet(DataSpec(examples=texts), tuple(Row("", text) for text in texts))
