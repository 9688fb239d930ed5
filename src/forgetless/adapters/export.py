"""Export an adapter for an engine, or as a merged model; compressed where that is asked for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from forgetless.adapters.card import CardFacts, CardFigures, Evaluated, Samples
from forgetless.adapters.compress import (
    COMPRESSED,
    IDENTITY,
    Compression,
    InputMetric,
    compressed,
    keep_figures,
    metric_on,
    rank_of,
)
from forgetless.adapters.engines import ENGINES
from forgetless.adapters.export_target import ExportJob, ExportTarget
from forgetless.adapters.gguf.target import LlamaCpp
from forgetless.adapters.merge import MergedModel, save_merged
from forgetless.adapters.plain_files import PlainLora
from forgetless.adapters.plain_lora import refuse_what_plain_lora_cannot_hold
from forgetless.data.spec import DataInput
from forgetless.errors import AdapterError, ForgetlessWarning
from forgetless.methods import make_method
from forgetless.models.placement import is_flattened, is_sharded
from forgetless.models.quantization import quantization_of
from forgetless.models.targets import base_of
from forgetless.processes import connected

__all__ = [
    "EXPORT_TARGETS",
    "export",
    "export_target",
    "save_merged",
]

EXPORT_TARGETS: dict[str, ExportTarget] = {
    target.name: target for target in (*map(PlainLora, ENGINES.values()), LlamaCpp(), MergedModel())
}


def export_target(name: str) -> ExportTarget:
    """A target by its name.

    Raises:
        AdapterError: There is no such target.
    """
    if name not in EXPORT_TARGETS:
        raise AdapterError(
            f"target: expected one of {', '.join(EXPORT_TARGETS)}, got {name!r}; `peft` is what "
            "everything else starts from"
        )
    return EXPORT_TARGETS[name]


def export(
    model: PeftModel,
    folder: Path | str,
    *,
    target: str = "peft",
    scale: float = 1.0,
    max_rank: int | None = None,
    moments_data: DataInput | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache: Path | str | None = None,
    adapter: str = "default",
    base_name: str | None = None,
    revision: str | None = None,
    method: str | Mapping[str, Any] | None = None,
    report: Evaluated | None = None,
    samples: Samples = "none",
) -> Path:
    """Write an adapter for an engine: one rank, alpha = rank, no patterns; or a merged model.

    Of several processes that torch.distributed connects, the first one writes. The others return at
    once, but where FSDP or DeepSpeed has sharded the model: then all of them must call this.

    Args:
        model: A PeftModel with any of our forms, or any PEFT LoRA on linear layers.
        folder: Where to write; made where it does not exist.
        target: Whose rules to meet: one of `EXPORT_TARGETS`. All but
            `llama.cpp` and `merged` load with peft alone.
        scale: Factor on ΔW.
        max_rank: Cut the rank to this; the figures lie beside the export in `compression.json`.
        moments_data: Data like those that the adapter is used on: the cut loses least there.
            A data spec, path, hub id, Dataset, list of strings, or "self".
        tokenizer: Needed for `moments_data`; written beside a merged model.
        cache: Folder to keep second moments and `self` samples in; none by default.
        adapter: Which adapter.
        base_name: Base model id to record; that of the model where none is given.
        revision: Its revision.
        method: How the adapter was started, as `attach` was told: the model card then names the
            method and its papers.
        report: What `forgetless.evaluate` returned: its figures go into the model card.
        samples: Which of the report's generated texts the card shows: `none`; `shareable`, which
            leaves out `self` data and items with `redistributable: false`; or `all`.

    Returns:
        The folder.

    Raises:
        AdapterError: No such adapter or target, tensors that a plain LoRA cannot hold, an adapter
            that the target's engine would not take, or a sharded model where all of it is needed.
    """
    chosen = export_target(target)
    check_compression(max_rank, moments_data)
    if is_flattened(model):
        raise AdapterError(
            "export: expected a model in one piece, or one that FSDP2 (fully_shard) or ZeRO-3 "
            "shards, got FSDP's first version; save through it, and export what PEFT reopens"
        )
    in_parts = is_sharded(model)
    if in_parts:
        _refuse_parts(chosen, moments_data)
    is_main = connected().is_main
    if not is_main and not in_parts:
        return Path(folder)
    refuse_what_plain_lora_cannot_hold(model, adapter)
    with _written(Path(folder), is_main) as place:
        job = ExportJob(
            model=model,
            folder=place,
            adapter=adapter,
            scale=scale,
            base_name=base_name,
            revision=revision,
            tokenizer=tokenizer,
            card=_card(model, adapter, method, report, samples, scale),
        )
        chosen.check(job)
        metric = IDENTITY
        if moments_data is not None and is_above(job, max_rank):
            if tokenizer is None:
                raise AdapterError(
                    "moments_data: expected the model's tokenizer too; pass tokenizer="
                )
            kept = Path(cache) if cache is not None else None
            metric = metric_on(model, tokenizer, moments_data, adapter=adapter, cache=kept)
        with cut_to(job, max_rank, metric) as (ready, compression):
            if compression is not None:
                ready = dataclasses.replace(ready, card=_cut_card(job.card, compression))
            chosen.write(ready)
            keep_figures(compression, job.folder)
    return Path(folder)


@contextmanager
def _written(folder: Path, is_main: bool) -> Iterator[Path]:
    """Where a process writes: what gathers a sharded model asks all of them, but one keeps it."""
    if is_main:
        yield folder
        return
    with TemporaryDirectory() as nowhere:
        yield Path(nowhere) / "adapter"


def _refuse_parts(target: ExportTarget, moments_data: object) -> None:
    """Refuse what needs the whole base, where each process holds a part.

    Raises:
        AdapterError: Says what to do.
    """
    if not target.is_peft or moments_data is not None:
        what = f"target {target.name}" if moments_data is None else "moments_data"
        raise AdapterError(
            f"export: expected a model in one piece for {what}, got a sharded one; export for peft "
            "first, and go on from that folder"
        )


def _card(
    model: PeftModel,
    adapter: str,
    method: str | Mapping[str, Any] | None,
    report: Evaluated | None,
    samples: Samples,
    scale: float,
) -> CardFacts:
    """What the caller knows of the adapter; rank and alpha are its own."""
    found = CardFigures("") if report is None else report.card_figures()
    made = None
    if method is not None:
        config = model.peft_config[adapter]
        values = {"name": method} if isinstance(method, str) else dict(method)
        made = make_method({"rank": config.r, "alpha": config.lora_alpha, **values})
    notes: tuple[str, ...] = ()
    if found.scale != scale:
        notes = (
            f"The update is scaled by {scale:g} here; the figures are those at scale "
            f"{found.scale:g}.",
        )
    if samples != "none" and report is None:
        warnings.warn(
            f"export: the model card shows no samples, though {samples} were asked for; pass "
            "report=, what forgetless.evaluate returned",
            ForgetlessWarning,
            stacklevel=3,
        )
    return CardFacts(
        quantization=quantization_of(base_of(model).config),
        method=made,
        figures=found.table,
        samples=found.chosen(samples),
        notes=notes,
    )


def _cut_card(card: CardFacts, cut: Compression) -> CardFacts:
    """The figures are of the adapter as it was."""
    words = f"rank cut from {cut.rank_before} to {cut.rank}, gain and retention not measured since"
    return dataclasses.replace(card, figures="", samples=(), trained=words)


def check_compression(max_rank: int | None, moments_data: object) -> None:
    """Refuse a rank that is none, and data that nothing is done with.

    Raises:
        AdapterError: Names the argument.
    """
    whole = isinstance(max_rank, int) and not isinstance(max_rank, bool)
    if max_rank is not None and not (whole and max_rank >= 1):
        raise AdapterError(
            f"max rank: expected a whole number, 1 or more, got {max_rank!r}; 32 is usual"
        )
    if max_rank is None and moments_data is not None:
        raise AdapterError(
            "moments data: expected a max rank to cut to, got none; give it, or leave the data out"
        )


def is_above(job: ExportJob, max_rank: int | None) -> bool:
    """Whether there is anything to cut."""
    return max_rank is not None and rank_of(job.model, job.adapter) > max_rank


@contextmanager
def cut_to(
    job: ExportJob, max_rank: int | None, metric: InputMetric
) -> Iterator[tuple[ExportJob, Compression | None]]:
    """The job on an adapter of at most `max_rank`, which lives inside the block only.

    The job itself, and None, where there is nothing to cut.
    """
    if max_rank is None or not is_above(job, max_rank):
        yield job, None
        return
    if metric.moments is None:
        warnings.warn(
            f"export: rank {rank_of(job.model, job.adapter)} is cut to {max_rank} in the identity "
            "metric, in which every input direction weighs the same; name data like those that the "
            "adapter is used on (moments data) to lose least there",
            ForgetlessWarning,
            stacklevel=4,
        )
    with compressed(
        job.model, max_rank, metric, adapter=job.adapter, scale=job.scale
    ) as compression:
        yield dataclasses.replace(job, adapter=COMPRESSED, scale=1.0), compression
