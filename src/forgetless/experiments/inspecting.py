"""What lies at a path: a run, an adapter, second moments, a cache of them, or a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from forgetless.adapters.load import CONFIG, WEIGHTS
from forgetless.calibration.store import read_moments_header
from forgetless.errors import ArtefactError
from forgetless.experiments.inspect_adapter import describe_adapter
from forgetless.experiments.output import RunFolder
from forgetless.experiments.progress import Progress
from forgetless.experiments.record import Record, load_record
from forgetless.experiments.runs import name_runs
from forgetless.experiments.tables import figures
from forgetless.models.describe import outline_model
from forgetless.training.checkpoint import latest_checkpoint

_CONFIG_KEYS = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")


def inspect(
    path: Path,
    *,
    model: str | None = None,
    moments: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Describe what lies at a path; from headers, without loading a model, but where one is asked.

    Args:
        path: A run folder, an adapter folder, a file of second moments or a folder of them, or a
            base model's folder.
        model: Base of an adapter, to measure its update against; loads it.
        moments: Second moments of that base, to measure drift with; loads the base too.
        progress: Hears of loading.

    Returns:
        Plain values, `kind` the first of them.

    Raises:
        ForgetlessError: Nothing known there, a damaged file, or moments of another model.
    """
    heard = progress or Progress()
    measured = model is not None or moments is not None
    if path.is_file() and path.suffix == ".safetensors":
        found = _moments(path)
    elif path.is_file() and path.name == "record.json":
        found = _record(path)
    elif (path / CONFIG).is_file():
        return describe_adapter(path, model=model, moments=moments, progress=heard)
    elif (path / "record.json").is_file() or (path / "recipe.yaml").is_file():
        return _run(RunFolder(path), model, moments, heard)
    elif (path / "config.json").is_file():
        found = _base(path)
    elif path.is_dir() and any(path.glob("moments-*.safetensors")):
        found = _cache(path)
    else:
        raise ArtefactError(
            f"{path}: expected a run folder, an adapter folder, a file or folder of second moments "
            f"or a model folder, got {_what(path)}; check the path"
        )
    if measured:
        raise ArtefactError(
            f"{path}: --model and --moments measure an adapter, got {found['kind']}; leave them out"
        )
    return found


def _run(
    folder: RunFolder, model: str | None, moments: Path | None, heard: Progress
) -> dict[str, Any]:
    record = load_record(folder.record) if folder.record.is_file() else None
    found: dict[str, Any] = {"kind": "run", "path": str(folder.path), "state": _state(folder)}
    if record is not None:
        found |= _facts(record)
    elif folder.recipe.is_file():
        recipe = _recipe(folder.recipe)
        found |= {key: recipe[key] for key in ("label", "model", "method", "seed") if key in recipe}
    if (folder.adapter / CONFIG).is_file():
        found["adapter"] = describe_adapter(
            folder.adapter, model=model, moments=moments, progress=heard
        )
    elif model is not None or moments is not None:
        raise ArtefactError(
            f"{folder.path}: expected an adapter to measure, got an unfinished run; finish it with "
            "forgetless run"
        )
    return found


def _state(folder: RunFolder) -> str:
    if folder.record.is_file():
        return "finished"
    newest = latest_checkpoint(folder.checkpoints)
    return f"stopped; the newest checkpoint is {newest.name}" if newest else "not trained yet"


def _facts(record: Record) -> dict[str, Any]:
    [run] = name_runs([record])
    return {
        "label": record.label,
        "created": record.created,
        "model": record.model.name,
        "dtype": record.model.dtype,
        "quantization": record.model.quantization,
        "fingerprint": record.model.fingerprint,
        "method": record.method,
        "seed": record.seed,
        "steps": record.training.steps,
        "learning_rate": record.training.learning_rate,
        "seconds": sum(record.phases.values()),
        "adapted_layers": len(record.layers),
        "warnings": record.warnings,
        "figures": figures([run]),
    }


def _record(path: Path) -> dict[str, Any]:
    return {"kind": "record", "path": str(path)} | _facts(load_record(path))


def _recipe(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ArtefactError(f"{path}: not a readable recipe; run it anew") from error
    return values if isinstance(values, dict) else {}


def _moments(path: Path) -> dict[str, Any]:
    header = read_moments_header(path)
    return {
        "kind": "second moments",
        "path": str(path),
        "bytes": path.stat().st_size,
        "model": header.key.get("model"),
        "dtype": header.key.get("dtype", "").removeprefix("torch."),
        "rows": header.key.get("rows"),
        "counted": header.key.get("tokens"),
        "num_tokens": header.num_tokens,
        "num_rows": header.num_samples,
        "sites": len(header.widths),
        "widths": sorted(set(header.widths.values())),
        "targets": len(header.targets),
    }


def _cache(path: Path) -> dict[str, Any]:
    entries, damaged = [], []
    for file in sorted(path.glob("moments-*.safetensors")):
        try:
            entries.append(_moments(file))
        except ArtefactError as error:
            damaged.append(str(error))
    return {
        "kind": "cache",
        "path": str(path),
        "bytes": sum(entry["bytes"] for entry in entries),
        "second_moments": entries,
        "damaged": damaged,
    }


def _base(path: Path) -> dict[str, Any]:
    model = outline_model(path)
    names = None if model.targets is None else {n.rpartition(".")[2] for n in model.targets}
    quantised = model.config.get("quantization_config")
    return {
        "kind": "base model",
        "path": str(path),
        "architecture": model.architecture,
        "parameters": model.parameters,
        "dtypes": list(model.dtypes),
        "bytes": model.num_bytes,
        **{key: model.config[key] for key in _CONFIG_KEYS if key in model.config},
        "quantisation": quantised.get("quant_method") if quantised else None,
        "chat_template": model.has_chat_template,
        "targets": None if model.targets is None else len(model.targets),
        "target_modules": None if names is None else sorted(names),
        "skipped_layers": model.skipped,
    }


def _what(path: Path) -> str:
    if not path.exists():
        return "nothing of that name"
    if (path / WEIGHTS).is_file():
        return f"adapter weights without {CONFIG}"
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        return "a GGUF file, which llama.cpp reads"
    return "a folder with none of them" if path.is_dir() else "another file"
