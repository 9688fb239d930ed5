"""Export what lies in a folder: a run, a training checkpoint, or anybody's LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from forgetless.adapters.export import export, save_merged
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.load import load_adapter, read_adapter_config
from forgetless.adapters.round_trip import RoundTrip, check_merged, check_round_trip
from forgetless.errors import AdapterError, RecipeError
from forgetless.experiments.adapter_folder import adapter_folder
from forgetless.experiments.mending import PROBE
from forgetless.experiments.progress import Progress, warnings_heard
from forgetless.models.load import base_reference, load_model
from forgetless.training.quiet import libraries_quiet


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how it compares with the live adapter.

    Attributes:
        rank: Of the adapter.
        check: What was written against the live adapter.
        dtype: Of the weights written.
    """

    rank: int
    check: RoundTrip
    dtype: torch.dtype


def export_folder(
    source: Path,
    output: Path,
    *,
    model: str | None = None,
    scale: float = 1.0,
    merge: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Load an adapter on its base, write it as plain LoRA or merged, reload it and compare logits.

    Args:
        source: A folder with an adapter, or a run folder.
        output: Where to write; must be empty or new.
        model: Base model; the one named in the adapter's own configuration by default.
        scale: Factor on ΔW.
        merge: Write the base with the update added, in place of an adapter; in the dtype of the
            base's own files, added in float32.
        progress: Hears of the phases.

    Raises:
        ForgetlessError: No adapter there, no base named, an output folder in use, an adapter that
            plain LoRA cannot hold, or logits that differ after reloading.
    """
    heard = progress or Progress()
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
            loaded = load_model(name, dtype="float32", revision=revision)
            peft_model = load_adapter(loaded.model, folder)
        probe = loaded.tokenizer(PROBE, return_tensors="pt").input_ids.to(loaded.device)
        with heard.phase("merge" if merge else "export"):
            if merge:
                dtype = _checkpoint_dtype(name, loaded.revision)
                heard.note(f"merged in float32, saved as {_word(dtype)}, as the base is")
                save_merged(peft_model, output, scale=scale, dtype=dtype)
                loaded.tokenizer.save_pretrained(str(output))
                merged = load_model(str(output), dtype=dtype).model
                check = check_merged(peft_model, merged, probe, scale=scale)
            else:
                dtype = torch.float32
                export(peft_model, output, scale=scale, base_name=name, revision=loaded.revision)
                check = check_round_trip(peft_model, output, probe, scale=scale)
    layers = adapted_layers(peft_model)
    rank = max(factors(layer)[0].shape[0] for layer in layers.values())
    return Exported(rank, check, dtype)


def _base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the base that an adapter says it was trained on."""
    config = read_adapter_config(folder)
    name = config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder}: names no base model; give it with --model")
    return str(name), config.get("revision")


def _checkpoint_dtype(name: str, revision: str | None) -> torch.dtype:
    """The dtype that the base's own configuration names; float32 where it names none."""
    config = AutoConfig.from_pretrained(base_reference(name), revision=revision)
    return config.dtype or config.get_text_config().dtype or torch.float32


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
