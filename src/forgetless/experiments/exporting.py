"""Export what lies in a folder: a run, a training checkpoint, or anybody's LoRA adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from forgetless.adapters.export import RoundTrip, check_round_trip, export, save_merged
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.load import CONFIG, load_adapter
from forgetless.errors import AdapterError, RecipeError
from forgetless.experiments.progress import Progress
from forgetless.models.load import load_model
from forgetless.training.quiet import libraries_quiet

_PROBE = "The quick brown fox jumps over the lazy dog."


@dataclass(frozen=True, slots=True)
class Exported:
    """Rank of the exported adapter, and how it compares with the live one."""

    rank: int
    check: RoundTrip


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
        merge: Write the base with the update added, in place of an adapter.
        progress: Hears of the phases.

    Raises:
        ForgetlessError: No adapter there, no base named, or an output folder in use.
    """
    heard = progress or Progress()
    if not scale > 0:
        raise RecipeError(
            f"scale: expected more than 0, got {scale}; 1 exports the adapter as it is"
        )
    folder = _adapter_folder(source)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AdapterError(f"{output}: expected a new or empty folder; choose another one")
    name = model or _base_name(folder)
    with libraries_quiet():
        with heard.phase("load"):
            # In float32, so that the comparison shows errors of the export and not rounding.
            loaded = load_model(name, dtype="float32" if not merge else "auto")
            peft_model = load_adapter(loaded.model, folder)
        probe = loaded.tokenizer(_PROBE, return_tensors="pt").input_ids.to(loaded.device)
        with heard.phase("merge" if merge else "export"):
            if merge:
                save_merged(peft_model, output, scale=scale)
                loaded.tokenizer.save_pretrained(str(output))
                check = _check_merged(peft_model, output, probe, scale)
            else:
                export(
                    peft_model,
                    output,
                    scale=scale,
                    base_name=name,
                    revision=loaded.revision,
                )
                check = check_round_trip(peft_model, output, probe, scale=scale)
    layers = adapted_layers(peft_model)
    return Exported(max(factors(layer)[0].shape[0] for layer in layers.values()), check)


def _adapter_folder(source: Path) -> Path:
    """The folder itself, or the adapter in a run folder."""
    for folder in (source, source / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise AdapterError(f"{source}: expected a folder with {CONFIG}, or a run; check the path")


def _base_name(folder: Path) -> str:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder}: names no base model; give it with --model")
    return str(name)


def _check_merged(
    peft_model: torch.nn.Module, folder: Path, probe: torch.Tensor, scale: float
) -> RoundTrip:
    from forgetless.adapters.scale import scaled_adapter

    merged = load_model(str(folder), dtype=str(next(peft_model.parameters()).dtype).split(".")[1])
    with torch.no_grad():
        peft_model.eval()
        with scaled_adapter(peft_model, scale):
            live = peft_model(input_ids=probe, use_cache=False).logits.float()
        found = merged.model.eval()(input_ids=probe, use_cache=False).logits.float()
    return RoundTrip(float((live - found).abs().max()), float(live.abs().max()))
