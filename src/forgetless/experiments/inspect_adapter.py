"""An adapter folder described: form, rank, size; measured on its base where one is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetless.adapters.load import load_adapter, read_adapter_config
from forgetless.adapters.plain_lora import beyond_plain_lora
from forgetless.adapters.stored import StoredAdapter, read_stored
from forgetless.calibration.store import MomentsHeader, load_moments, read_moments_header
from forgetless.errors import AdapterError, ArtefactError
from forgetless.evaluation.weight_movement import mean_drift, measure_weights, relative_update
from forgetless.experiments.progress import Progress
from forgetless.models.load import load_model, model_fingerprint
from forgetless.training.checkpoint import read_marker
from forgetless.training.quiet import libraries_quiet


def describe_adapter(
    folder: Path, *, model: str | None, moments: Path | None, progress: Progress
) -> dict[str, Any]:
    """Describe any PEFT LoRA; with a base or second moments, load the base and measure.

    Args:
        folder: Of the adapter.
        model: Its base; the one named in its configuration where only moments are given.
        moments: A file of second moments of that base.
        progress: Hears of loading.

    Raises:
        ForgetlessError: A damaged file, no base named, or moments of another model.
    """
    config = read_adapter_config(folder)
    found: dict[str, Any] = {
        "kind": "adapter",
        "path": str(folder),
        "peft_type": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
    }
    if config.get("peft_type") == "LORA":
        found |= _stored(read_stored(folder), folder)
    if model is not None or moments is not None:
        found |= _measured(folder, model, moments, found, progress)
    return found


def _stored(adapter: StoredAdapter, folder: Path) -> dict[str, Any]:
    marker, config = read_marker(folder), adapter.config
    form = marker.identity.form if marker else "both" if adapter.is_both else "plain LoRA"
    largest = max(adapter.norms, key=lambda name: adapter.norms[name], default=None)
    beyond = beyond_plain_lora(config)
    # Of DoRA, and of starts that changed the base, B A is not the update.
    is_update = not any(entry.startswith(("use_dora=", "init_lora_weights=")) for entry in beyond)
    ranks = sorted(set(adapter.ranks.values()))
    rank = ranks[0] if len(ranks) == 1 else ranks
    return {
        "rank": rank,
        "alpha": config.get("lora_alpha"),
        "rslora": bool(config.get("use_rslora")),
        "form": form,
        "step": marker.step if marker else None,
        "target_modules": _names(config.get("target_modules")),
        "adapted_layers": len(adapter.ranks),
        "parameters": adapter.parameters,
        "dtypes": list(adapter.dtypes),
        "update_norm": adapter.update_norm if is_update else None,
        "largest_update": None
        if largest is None or not is_update
        else {"layer": largest, "update_norm": adapter.norms[largest]},
        "beyond_plain_lora": beyond,
        "other_tensors": list(adapter.others),
    }


def _names(modules: object) -> object:
    """Names in order; a pattern stays as it is."""
    return sorted(modules) if isinstance(modules, list) else modules


def _measured(
    folder: Path,
    model: str | None,
    moments: Path | None,
    found: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    name = model or found["base"]
    if not name:
        raise AdapterError(f"{folder}: names no base model; give it with --model")
    header = None if moments is None else _header(moments)
    # In the dtype that the moments were collected in: it is part of the base's fingerprint.
    dtype = "auto" if header is None else header.key["dtype"].removeprefix("torch.")
    revision = None if model else found["revision"]
    with libraries_quiet(), progress.phase("load"):
        loaded = load_model(str(name), dtype=dtype, revision=revision)
        stored = None
        if moments is not None and header is not None:
            fingerprint = model_fingerprint(loaded.model)
            if header.key["model"] != fingerprint:
                raise ArtefactError(
                    f"{moments}: expected second moments of {name} ({fingerprint}), got those of "
                    f"another model ({header.key['model']}); give the base that they were "
                    "collected on with --model"
                )
            stored = load_moments(moments, header.key)
        layers = measure_weights(load_adapter(loaded.model, folder), stored)
    return {
        "measured_on": str(name),
        "relative_update": relative_update(layers),
        "drift": mean_drift(layers),
        "moments": None if moments is None else str(moments),
    }


def _header(moments: Path) -> MomentsHeader:
    if not moments.is_file():
        raise ArtefactError(f"{moments}: expected a file of second moments, found none; check it")
    return read_moments_header(moments)
