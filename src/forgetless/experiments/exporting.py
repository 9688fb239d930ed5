"""Export what lies in a folder: a run, a training checkpoint, or anybody's LoRA adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from forgetless.adapters.card import CardFigures, Samples
from forgetless.adapters.compress import (
    IDENTITY,
    Compression,
    InputMetric,
    keep_figures,
    metric_on,
    rank_of,
)
from forgetless.adapters.export import check_compression, cut_to, export_target, is_above
from forgetless.adapters.export_target import ExportJob
from forgetless.adapters.load import load_adapter, read_adapter_config
from forgetless.adapters.plain_lora import refuse_what_plain_lora_cannot_hold
from forgetless.adapters.round_trip import PROBE_TEXT, RoundTrip
from forgetless.data.spec import DataSpec, parse_data
from forgetless.errors import AdapterError, RecipeError
from forgetless.experiments.adapter_folder import adapter_folder
from forgetless.experiments.describe import dtype_name
from forgetless.experiments.model_card import write_export_card
from forgetless.experiments.progress import Progress, warnings_heard
from forgetless.models.cache import cache_dir
from forgetless.models.load import LoadedModel, base_reference, load_model
from forgetless.training.quiet import libraries_quiet


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how it compares with the live adapter.

    Attributes:
        summary: What it is, in words.
        rank: Of the update, without the zeros that an engine asks for.
        check: Logits of what was written against those of the live adapter.
        dtype: Of the weights written.
        is_adapter: Whether it is loaded beside the base.
        is_peft: Whether PEFT loads it.
        compression: What cutting the rank did; None where nothing was cut.
    """

    summary: str
    rank: int
    check: RoundTrip
    dtype: torch.dtype
    is_adapter: bool
    is_peft: bool
    compression: Compression | None

    def figures(self) -> dict[str, Any]:
        """All of it as plain values, but for single layers."""
        found: dict[str, Any] = {
            "kind": "adapter" if self.is_adapter else "merged",
            "rank": self.rank,
            "dtype": dtype_name(self.dtype),
            **asdict(self.check),
        }
        if self.compression is not None:
            found["compression"] = asdict(self.compression)
            del found["compression"]["layers"]
        return found


def export_folder(
    source: Path,
    output: Path,
    *,
    model: str | None = None,
    target: str = "peft",
    scale: float = 1.0,
    max_rank: int | None = None,
    moments_data: str | None = None,
    quantization: str = "none",
    samples: Samples = "none",
    progress: Progress | None = None,
) -> Exported:
    """Load an adapter on its base, write it for a target, reload it and compare logits.

    Args:
        source: A folder with an adapter, or a run folder.
        output: Where to write; must be empty or new.
        model: Base model; the one named in the adapter's own configuration by default.
        target: One of `EXPORT_TARGETS`. A merged model is added in float32 and written in the dtype
            of the base's own files.
        scale: Factor on ΔW.
        max_rank: Cut the rank to this, losing least on `moments_data`; the figures go into
            `compression.json` beside the export.
        moments_data: A path, a hub id, `self`, or a data spec as YAML.
        quantization: How to quantise the base while it is loaded, to compare in less memory.
        samples: Which of the run's generated texts the model card shows: `none`, `shareable`
            (not those of `self` data and of items with `redistributable: false`), or `all`.
        progress: Hears of the phases, and of warnings.

    Raises:
        ForgetlessError: No adapter there, no base named, an output folder in use, an adapter that
            plain LoRA cannot hold or that the target's engine would not take, or logits that differ
            after reloading.
    """
    heard = progress or Progress()
    chosen = export_target(target)
    check_compression(max_rank, moments_data)
    CardFigures("").chosen(samples)  # refused before anything is loaded
    if quantization != "none" and not chosen.is_adapter:
        raise AdapterError(
            f"quantization: expected none for the target {chosen.name}, whose weights are written "
            f"in full, got {quantization}; leave out --quantization"
        )
    data = None if moments_data is None else _moments_data(moments_data)
    if not scale > 0:
        raise RecipeError(
            f"scale: expected more than 0, got {scale}; 1 exports the adapter as it is"
        )
    folder = adapter_folder(source)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AdapterError(f"{output}: expected a new or empty folder; choose another one")
    name, revision = (model, None) if model else _base_of_adapter(folder)
    with libraries_quiet(), warnings_heard(heard.warn):
        with heard.phase("load"):
            # In float32, so that the comparison shows errors of the export and not rounding.
            loaded = load_model(name, dtype="float32", revision=revision, quantization=quantization)
            peft_model = load_adapter(loaded.model, folder)
            refuse_what_plain_lora_cannot_hold(peft_model)
        job = ExportJob(
            model=peft_model,
            folder=output,
            scale=scale,
            base_name=name,
            revision=loaded.revision,
            tokenizer=loaded.tokenizer,
            checkpoint_dtype=checkpoint_dtype(name, loaded.revision),
        )
        chosen.check(job)
        metric = IDENTITY
        if data is not None:
            metric = _metric(job, max_rank, data, loaded, heard)
        probe = loaded.tokenizer(PROBE_TEXT, return_tensors="pt").input_ids.to(loaded.device)
        with heard.phase("export"), cut_to(job, max_rank, metric) as (ready, compression):
            dtype = chosen.write(ready)
            keep_figures(compression, output)
            check = chosen.compare(ready, probe)
            rank = rank_of(ready.model, ready.adapter)
    write_export_card(
        output,
        folder,
        base=model,
        scale=scale,
        merged=not chosen.is_adapter,
        cut=compression,
        samples=samples,
        warn=heard.warn,
    )
    summary = chosen.summary(rank, dtype)
    return Exported(summary, rank, check, dtype, chosen.is_adapter, chosen.is_peft, compression)


def _moments_data(text: str) -> list[DataSpec]:
    """A name as it stands, or a data spec in YAML: `{path: rows.jsonl, text: "{question}"}`."""
    value: Any = text
    if text.lstrip().startswith(("{", "[")):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"moments data: expected a path, `self` or a data spec, got {text!r}, which is no "
                "YAML; quote the texts in it"
            ) from error
    return parse_data(value, where="moments data")


def _metric(
    job: ExportJob,
    max_rank: int | None,
    data: list[DataSpec],
    loaded: LoadedModel,
    heard: Progress,
) -> InputMetric:
    """The metric of the data; not collected where nothing is cut."""
    if not is_above(job, max_rank):
        rank = rank_of(job.model, job.adapter)
        heard.note(f"rank {rank} is not above {max_rank}: nothing to cut, the data are not read")
        return IDENTITY
    with heard.phase("calibrate"):
        return metric_on(
            job.model,
            loaded.tokenizer,
            data,
            adapter=job.adapter,
            cache=cache_dir() / "runs",
            progress=lambda done, total: heard.advance(done, total, "moments"),
        )


def _base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the base that an adapter says it was trained on."""
    config = read_adapter_config(folder)
    name = config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder}: names no base model; give it with --model")
    return str(name), config.get("revision")


def checkpoint_dtype(name: str, revision: str | None) -> torch.dtype:
    """The dtype that the base's own configuration names; float32 where it names none."""
    config = AutoConfig.from_pretrained(base_reference(name), revision=revision)
    return config.dtype or config.get_text_config().dtype or torch.float32
