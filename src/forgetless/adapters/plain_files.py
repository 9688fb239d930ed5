"""Write a plain LoRA folder that loads with peft alone, laid out as an engine wants it."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.base_identity import base_metadata
from forgetless.adapters.card import write_card
from forgetless.adapters.engines import A_SUFFIX, B_SUFFIX, PREFIX, Engine, missing_of_types
from forgetless.adapters.export_target import ExportJob, ExportTarget
from forgetless.adapters.exported_files import PEFT_LORA
from forgetless.adapters.forms import adapted_layers
from forgetless.adapters.lint import refuse_breaches
from forgetless.adapters.load import WEIGHTS
from forgetless.adapters.plain_lora import refuse_what_plain_lora_cannot_hold
from forgetless.adapters.round_trip import RoundTrip, check_round_trip
from forgetless.adapters.updates import (
    Updates,
    base_name_of,
    padded,
    rank_of_updates,
    updates_to_write,
)
from forgetless.adapters.whole_folder import written_into
from forgetless.models.load import base_reference
from forgetless.models.targets import Target, base_of, find_targets, module_suffixes


class PlainLora(ExportTarget):
    """One rank, alpha = rank, no patterns; padded with zeros where an engine wants more."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self._engine = engine

    def write(self, job: ExportJob) -> torch.dtype:
        """Configuration, tensors in float32, and a model card (`README.md`)."""
        refuse_what_plain_lora_cannot_hold(job.model, job.adapter)
        linear = find_targets(job.model).targets
        layers = adapted_layers(job.model, job.adapter)
        updates = updates_to_write(job)
        rank = self._engine.padded(rank_of_updates(updates))
        if self._engine.wants_whole_types:
            updates |= _zeros(missing_of_types(list(layers), linear), linear)
        with written_into(job.folder, "export", PEFT_LORA) as workplace:
            save_plain(workplace, job, padded(updates, rank))
            refuse_breaches(workplace, self._engine, {*linear, *layers}, shown=job.folder)
            write_card(workplace, replace(job.card, base=base_name_of(job)))
        return torch.float32

    def compare(self, job: ExportJob, input_ids_BT: Tensor) -> RoundTrip:
        """Load the folder beside the live adapter."""
        return check_round_trip(
            job.model, job.folder, input_ids_BT, scale=job.scale, adapter=job.adapter
        )

    def summary(self, rank: int, dtype: torch.dtype) -> str:
        """The rank, and the zeros that were added."""
        padded = self._engine.padded(rank)
        zeros = f", padded with zeros to {padded} for {self.name}" if padded > rank else ""
        return f"LoRA of rank {rank}{zeros}"


def save_plain(folder: Path, job: ExportJob, updates: Updates) -> None:
    """Write updates of one rank as a folder that PEFT opens on the base of the job."""
    base, name = base_of(job.model), base_name_of(job)
    layers = adapted_layers(job.model, job.adapter)
    rank = rank_of_updates(updates)
    config = LoraConfig(
        task_type=job.model.peft_config[job.adapter].task_type,
        base_model_name_or_path=base_reference(name) if name else None,
        revision=job.revision,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=module_suffixes(base, list(updates)),
        init_lora_weights=True,
        fan_in_fan_out=all(isinstance(x.get_base_layer(), Conv1D) for x in layers.values()),
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for module, (a_RD, b_OR) in updates.items():
        tensors[f"{PREFIX}{module}{A_SUFFIX}"] = a_RD.float().cpu().contiguous()
        tensors[f"{PREFIX}{module}{B_SUFFIX}"] = b_OR.float().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt", **base_metadata(base)})
    config.save_pretrained(str(folder))


def _zeros(names: list[str], linear: dict[str, Target]) -> Updates:
    """Factors of no update."""
    return {
        name: (
            torch.zeros(0, linear[name].in_features),
            torch.zeros(linear[name].out_features, 0),
        )
        for name in names
    }
