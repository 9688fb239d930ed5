"""From a base model and data to a PEFT model whose adapter starts exactly at the base."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.arguments import check_arguments, parse_bytes
from forgetless.adapters.from_data import Calibrated, start_from_data
from forgetless.adapters.in_place import check_startable
from forgetless.adapters.load import removal
from forgetless.adapters.peft_layers import refuse_unholdable
from forgetless.adapters.start import LayerStart, fill_layers
from forgetless.adapters.variant import LIVE_BOTH
from forgetless.calibration.engine import SiteMoments
from forgetless.calibration.weights import weights_that_count
from forgetless.data.loading import load_rows
from forgetless.data.overlap import refuse_overlap
from forgetless.data.rows import RowSet
from forgetless.data.spec import DataInput, SourceWeights, parse_data
from forgetless.errors import AdapterError, ForgetlessWarning, MethodError
from forgetless.methods import MethodInput, make_method
from forgetless.methods.base import Method, Role
from forgetless.models.bitsandbytes_cpu import keep_trainable_layout
from forgetless.models.placement import is_flattened, is_sharded
from forgetless.models.state import activation
from forgetless.models.targets import (
    Target,
    TargetSelection,
    base_of,
    find_targets,
    module_suffixes,
)
from forgetless.models.untouched import refuse_touched_base
from forgetless.processes import ALONE, Processes, connected

_LATER_OPTIONS = (("rslora", False),)
SHOWN_SKIPS = 3  # of each reason


@dataclass(frozen=True, slots=True)
class Attached:
    """An adapted model and what was learned on the way.

    Attributes:
        model: The PEFT model; its base is untouched.
        method: The method with all its options.
        starts: By layer.
        skipped: Layers with weights that got no adapter, with the reason.
        moments: By role; calibration moments of the base, where they are still at hand.
        calibrated: By role: on how much.
        passes: Forward passes over the data, one for each group of layers that fits into memory.
        moment_bytes: What the moments held at a time take.
        origin: Hash of what A0 and B0 follow from besides the base: method, data, targets, seed.
    """

    model: PeftModel
    method: Method
    starts: dict[str, LayerStart]
    skipped: dict[str, str]
    moments: dict[Role, SiteMoments]
    calibrated: dict[Role, Calibrated]
    passes: int
    moment_bytes: int
    origin: str


def attach(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: MethodInput = "lora-null",
    rank: int | None = None,
    preserve_data: DataInput | None = None,
    train_data: DataInput | None = None,
    targets: Sequence[str] | None = None,
    source_weights: SourceWeights = "tokens",
    batch_size: int = 8,
    min_tokens: int | None = None,
    memory_budget: int | str | None = None,
    cache: Path | str | None = None,
    adapter: str = "default",
    seed: int = 0,
) -> PeftModel:
    """Calibrate, initialise and attach an adapter; hand the result to any trainer.

    Where torch.distributed connects several processes (torchrun, `accelerate launch`), each of them
    calls this with the same arguments, on a model that is whole: they divide the rows of the
    calibration and the solves, and every one gets the same adapter. Sharding (FSDP, ZeRO) comes
    afterwards.

    Args:
        model: A transformers causal language model or encoder-decoder, or a PeftModel that gets
            one more adapter.
        tokenizer: Its tokenizer.
        method: A name, or a mapping of a name and options; `forgetless methods` lists them.
        rank: Shorthand for the method's option; alpha = rank unless the method says otherwise.
        preserve_data: What must not be forgotten: a data spec, path, hub id, `datasets.Dataset`,
            list of strings, or "self". Only for methods that need it. An encoder-decoder needs
            rows of prompt and completion.
        train_data: What is to be learned; only for methods that need it.
        targets: Module names as in PEFT's `target_modules`; by default every linear layer but the
            head.
        source_weights: Of several sources of a role: "tokens" counts every token once, "equal"
            every source once, however long it is.
        batch_size: Rows in a calibration forward pass; the result does not depend on it.
        min_tokens: Fewest preserve tokens to accept, in place of the widest site's width.
        memory_budget: Bytes, or a text such as "8GiB", that second moments may take at a time; by
            default what is free. What is more takes several forward passes over the data, each over
            a group of layers and no further; the result is the same.
        cache: Folder to keep second moments, solved starts and `self` samples in; none by default.
        adapter: Name of the adapter in PEFT.
        seed: Seed of random starts.

    Returns:
        A `peft.PeftModel` in the training state of `model`.

    Raises:
        ForgetlessError: The message says where, what was expected, what came, and what to do. The
            model is as it was then.
    """
    folder = Path(cache) if cache is not None else None
    check_arguments(
        model,
        tokenizer,
        source_weights=source_weights,
        batch_size=batch_size,
        min_tokens=min_tokens,
        cache=folder,
        adapter=adapter,
        seed=seed,
    )
    budget = parse_bytes(memory_budget, "memory_budget")
    made = make_method(method, rank)
    selection = find_targets(model, targets)
    refuse_unholdable(model, made, selection.targets)  # before `self` is sampled
    if targets is None:
        _warn_of_skips(selection)
    given: dict[Role, DataInput | None] = {"train": train_data, "preserve": preserve_data}
    row_sets: dict[Role, list[RowSet]] = {}
    for role in sorted(made.reads):
        value = given[role]
        if value is None:
            raise MethodError(f"method {made.name} needs {role} data: pass {role}_data")
        row_sets[role] = [
            load_rows(spec, tokenizer, model=model, cache=folder) for spec in parse_data(value)
        ]
    return attach_rows(
        model,
        tokenizer,
        method=made,
        row_sets=row_sets,
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


def attach_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: Method,
    row_sets: Mapping[Role, Sequence[RowSet]],
    collected: Mapping[Role, SiteMoments] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    also: frozenset[Role] = frozenset(),
    targets: Sequence[str] | None = None,
    source_weights: SourceWeights = "tokens",
    batch_size: int = 8,
    min_tokens: int | None = None,
    memory_budget: int | None = None,
    cache: Path | None = None,
    adapter: str = "default",
    seed: int = 0,
    progress: Callable[[Role, int, int], None] | None = None,
    processes: Processes = ALONE,
) -> Attached:
    """`attach` on rows that are loaded already; tells what it found.

    `collected` holds moments of roles that have no row sets, `gradients` the first gradient where
    there are no train row sets to take it on, `also` names roles to collect moments
    of beside those that the method needs. An adapter of the name given that the
    model holds already is started anew in place, where it is an ordinary LoRA without an update.
    `progress` is called with the role, the rows done, and all rows. Several `processes` divide
    the rows and the solves.
    """
    refuse_touched_base(model)
    if is_flattened(model) or is_sharded(model):
        raise AdapterError(
            "attach: expected a model in one piece, got a sharded one; attach first, and shard "
            "(fully_shard, deepspeed.initialize) afterwards"
        )
    keep_trainable_layout(model)
    base = base_of(model)
    if isinstance(model, PeftModel) and adapter in model.peft_config:
        check_startable(model, method, adapter)
    selection = find_targets(model, targets)
    for target in selection.targets.values():
        method.check_layer(target.name, target.in_features, target.out_features)
    if not (isinstance(model, PeftModel) and adapter in model.peft_config):
        refuse_unholdable(model, method, selection.targets)
    refuse_overlap({role: row_sets.get(role, ()) for role in sorted(method.reads | also)})
    found = start_from_data(
        model,
        tokenizer,
        method,
        selection.targets,
        row_sets,
        collected=collected or {},
        gradients=gradients,
        also=also,
        source_weights=source_weights,
        batch_size=batch_size,
        min_tokens=min_tokens,
        memory_budget=memory_budget,
        cache=cache,
        seed=seed,
        progress=progress,
        processes=processes,
    )
    with ExitStack() as undo:
        if isinstance(model, PeftModel) and adapter in model.peft_config:
            peft_model = model
        else:
            undo.callback(removal(model, adapter))
            undo.callback(activation(model))
            peft_model = _add_adapter(model, base, method, selection.targets, adapter)
        # A folder saved while training holds deviations that PEFT alone would read as an adapter.
        init = LIVE_BOTH if method.form == "both" else True
        peft_model.peft_config[adapter].init_lora_weights = init
        starts = fill_layers(peft_model, method, adapter, found.solved, found.site_of)
        undo.pop_all()
    calibrated_on = [row_sets.get(role, ()) for role in found.calibrated]
    weights = {weights_that_count(sources, source_weights) for sources in calibrated_on}
    origin = _origin(method, row_sets, selection.targets, weights, seed)
    return Attached(
        model=peft_model,
        method=method,
        starts={name: starts[name] for name in selection.targets},
        skipped=selection.skipped,
        moments=found.moments,
        calibrated=found.calibrated,
        passes=found.passes,
        moment_bytes=found.moment_bytes,
        origin=origin,
    )


def _origin(
    method: Method,
    row_sets: Mapping[Role, Sequence[RowSet]],
    targets: Mapping[str, Target],
    source_weights: Set[SourceWeights],
    seed: int,
) -> str:
    """16 hex digits; not of the solved tensors, whose last bits depend on the number of threads.

    Options that came later count only where they are set, so that checkpoints of before go on.
    """
    roles = sorted(method.reads & row_sets.keys())
    data = {role: [rows.fingerprint for rows in row_sets[role]] for role in roles}
    options = {k: v for k, v in asdict(method).items() if (k, v) not in _LATER_OPTIONS}
    described = [method.name, options, data, sorted(targets), seed]
    described += sorted(source_weights - {"tokens"})
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _warn_of_skips(selection: TargetSelection) -> None:
    skipped = selection.unexpected_skips()
    if not skipped:
        return
    by_reason: dict[str, list[str]] = {}
    for name, why in skipped.items():
        by_reason.setdefault(why, []).append(name)
    shown = "; ".join(f"{_shown(names)} ({why})" for why, names in by_reason.items())
    warnings.warn(
        f"attach: {len(skipped)} layer{'s' if len(skipped) > 1 else ''} with weights get no "
        f"adapter and stay as they are: {shown}",
        ForgetlessWarning,
        stacklevel=3,
    )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_SKIPS} more" if len(names) > SHOWN_SKIPS else ""
    return ", ".join(names[:SHOWN_SKIPS]) + more


def _add_adapter(
    model: nn.Module,
    base: PreTrainedModel,
    method: Method,
    targets: Mapping[str, Target],
    adapter: str,
) -> PeftModel:
    """Let PEFT make its layers; the tensors are overwritten afterwards."""
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.lora_alpha,
        lora_dropout=0.0,
        target_modules=module_suffixes(base, list(targets)),
        init_lora_weights=True,
        fan_in_fan_out=all(isinstance(t.module, Conv1D) for t in targets.values()),
    )
    existing, training = set(model.modules()), model.training
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
        model.set_adapter(adapter)
        peft_model = model
    else:
        peft_model = get_peft_model(base, config, adapter_name=adapter)
    for module in peft_model.modules():
        if module not in existing:  # PEFT makes them in training mode, whatever the base is in
            module.training = training
    return peft_model
