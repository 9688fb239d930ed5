"""Hold an adapter folder, ours or anybody's, against the rules of an engine; writes nothing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from forgetless.adapters.engines import ENGINES, AdapterFiles, Engine
from forgetless.adapters.gguf.architectures import NAME as LLAMA_CPP
from forgetless.adapters.gguf.lint import gguf_breaches
from forgetless.adapters.load import WEIGHTS, read_adapter_config
from forgetless.errors import AdapterError, ArtefactError
from forgetless.models.targets import find_targets


def lint_adapter(folder: Path | str, target: str, model: nn.Module | None = None) -> list[str]:
    """What an engine would not take of an adapter folder as it stands.

    Only the configuration and the names and shapes of the tensors are read. `forgetless.export`
    rewrites what can be rewritten.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`; for llama.cpp with one
            GGUF file, of which all is read.
        target: `peft`, `vllm`, `sglang`, `tgi` or `llama.cpp`.
        model: The base; TGI's rule needs it; for llama.cpp names and shapes are held against it.

    Returns:
        One sentence a breach, with what to do; empty where the engine's rules are met.

    Raises:
        AdapterError: No adapter there, or no such engine.
        ArtefactError: A truncated or damaged file.
    """
    if target == LLAMA_CPP:
        return gguf_breaches(Path(folder), model)
    if target not in ENGINES:
        raise AdapterError(
            f"target: expected one of {', '.join([*ENGINES, LLAMA_CPP])}, got {target!r}; only "
            "engines that load adapters have rules"
        )
    layers = None
    if model is not None:
        found = find_targets(model)
        layers = [*found.targets, *found.unexpected_skips()]
    return ENGINES[target].breaches(_read(Path(folder), layers))


def refuse_breaches(
    folder: Path, engine: Engine, base_layers: Collection[str], shown: Path
) -> None:
    """Refuse a folder that an engine would not take; messages call it `shown`.

    Raises:
        AdapterError: The first breach, and how many there are.
    """
    breaches = engine.breaches(_read(folder, base_layers))
    if breaches:
        more = f" (and {len(breaches) - 1} more)" if len(breaches) > 1 else ""
        raise AdapterError(f"{shown}: for {engine.name} {breaches[0]}{more}")


def _read(folder: Path, base_layers: Collection[str] | None) -> AdapterFiles:
    config = read_adapter_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder}: expected {WEIGHTS}, found none; save it as safetensors")
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: truncated or damaged ({error}); copy it again") from error
    return AdapterFiles(config, shapes, base_layers)
