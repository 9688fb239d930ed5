"""Write a plain LoRA folder that loads with peft alone, laid out as an engine wants it."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

from dataclasses import replace

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.base_identity import base_metadata
from forgetless.adapters.card import write_card
from forgetless.adapters.engines import A_SUFFIX, B_SUFFIX, PREFIX, Engine, missing_of_types
from forgetless.adapters.export_target import ExportJob, ExportTarget
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.lint import refuse_breaches
from forgetless.adapters.load import WEIGHTS
from forgetless.adapters.plain_lora import refuse_what_plain_lora_cannot_hold
from forgetless.adapters.round_trip import RoundTrip, check_round_trip
from forgetless.adapters.whole_folder import written_into
from forgetless.errors import AdapterError
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
        base, linear = base_of(job.model), find_targets(job.model).targets
        layers = adapted_layers(job.model, job.adapter)
        updates = _updates(layers, job)
        rank = self._engine.padded(max(a_RD.shape[0] for a_RD, _ in updates.values()))
        if self._engine.wants_whole_types:
            updates |= _zeros(missing_of_types(list(layers), linear), linear)
        name = job.base_name or base.config.name_or_path
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
        with written_into(job.folder, "export") as workplace:
            metadata = {"format": "pt", **base_metadata(base)}
            save_file(_tensors(updates, rank), workplace / WEIGHTS, metadata)
            config.save_pretrained(str(workplace))
            refuse_breaches(workplace, self._engine, {*linear, *layers}, shown=job.folder)
            write_card(workplace, replace(job.card, base=name or None))
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


def _updates(layers: dict[str, LoraLayer], job: ExportJob) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer, all scales folded into B."""
    found = {}
    for name, layer in layers.items():
        a_RD, b_OR = factors(layer, job.adapter)
        b_OR = b_OR * job.scale
        if not (a_RD.isfinite().all() and b_OR.isfinite().all()):
            raise AdapterError(f"export: layer {name} holds NaN or inf; nothing was written")
        found[name] = (a_RD, b_OR)
    return found


def _zeros(names: list[str], linear: dict[str, Target]) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of no update."""
    return {
        name: (
            torch.zeros(0, linear[name].in_features),
            torch.zeros(linear[name].out_features, 0),
        )
        for name in names
    }


def _tensors(updates: dict[str, tuple[Tensor, Tensor]], rank: int) -> dict[str, Tensor]:
    """A and B under PEFT's names, padded with zeros to one rank."""
    tensors: dict[str, Tensor] = {}
    for name, (a_RD, b_OR) in updates.items():
        padding = rank - a_RD.shape[0]
        a_RD = nn.functional.pad(a_RD, (0, 0, 0, padding))
        b_OR = nn.functional.pad(b_OR, (0, padding))
        tensors[f"{PREFIX}{name}{A_SUFFIX}"] = a_RD.float().cpu().contiguous()
        tensors[f"{PREFIX}{name}{B_SUFFIX}"] = b_OR.float().cpu().contiguous()
    return tensors
