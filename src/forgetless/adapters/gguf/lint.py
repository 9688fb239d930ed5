"""What llama.cpp refuses, passes over or scales otherwise, in a GGUF file of an adapter."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from forgetless.adapters.gguf.architectures import NAME, architecture_of
from forgetless.adapters.gguf.files import (
    GGUF,
    A,
    B,
    GgufLora,
    layer_of,
    read_lora,
    updates_of,
)
from forgetless.adapters.load import CONFIG
from forgetless.errors import AdapterError
from forgetless.models.targets import base_of, find_targets

_REWRITE = f"forgetless export --target {NAME} writes it"


def gguf_breaches(folder: Path, model: nn.Module | None = None) -> list[str]:
    """One sentence a breach, with what to do.

    Args:
        folder: With one GGUF file.
        model: The base; names and shapes are held against it where it is given.

    Raises:
        AdapterError: No adapter there, a base of an architecture that was not verified, or no
            package `gguf`.
        ArtefactError: A truncated or damaged file.
    """
    found = sorted(folder.glob("*.gguf"))
    if not found and (folder / CONFIG).is_file():
        return [f"expected a GGUF file, got a folder that PEFT reads; {_REWRITE}"]
    if len(found) != 1:
        raise AdapterError(
            f"{folder}: expected one GGUF file, such as {GGUF}, found {len(found)}; check the path"
        )
    lora = read_lora(found[0])
    breaches = [*_metadata(lora), *_tensors(lora)]
    if model is not None and not breaches:
        breaches += _on_base(lora, model)
    return breaches


def _metadata(lora: GgufLora) -> Iterator[str]:
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if lora.metadata.get(key) != expected:
            yield f"expected {key} {expected}, got {lora.metadata.get(key)!r}; {_REWRITE}"
    alpha = lora.metadata.get("adapter.lora.alpha")
    if lora.layers and alpha != lora.rank:
        yield f"expected adapter.lora.alpha = rank = {lora.rank}, got {alpha!r}; {_REWRITE}"


def _tensors(lora: GgufLora) -> Iterator[str]:
    """A and B of layers inside blocks, in pairs of one rank, and nothing else."""
    if not lora.layers:
        yield f"expected A and B of at least one layer, got none; {_REWRITE}"
    for name, tensor in lora.tensors.items():
        if name.endswith("_norm.weight"):
            yield f"expected A and B only, got {name}, which {NAME} ignores; train without norms"
        elif not name.endswith((A, B)):
            yield f"expected A and B only, got {name}, which {NAME} refuses; leave it out"
        elif tensor.ndim != 2:
            yield f"expected a matrix, got {name} of shape {list(tensor.shape)}; {_REWRITE}"
        elif not bool(tensor.isfinite().all()):
            yield f"expected finite numbers, got NaN or inf in {name}; train it again"
        elif name.endswith(B) and name.removesuffix(B) + A not in lora.tensors:
            yield f"expected {A} beside {name}, found none; {_REWRITE}"
        elif name.endswith(A):
            yield from _layer(lora, name.removesuffix(A))
    ranks = sorted({t.shape[0] for n, t in lora.tensors.items() if n.endswith(A) and t.ndim == 2})
    if len(ranks) > 1:
        yield f"expected one rank in every layer, got {ranks}; {_REWRITE}"


def _layer(lora: GgufLora, name: str) -> Iterator[str]:
    if layer_of(name) == name:
        yield f"expected layers inside blocks (blk.0.…), got {name}; leave it out of target_modules"
    a_RD, b_OR = lora.tensors[name + A], lora.tensors.get(name + B)
    if b_OR is None:
        yield f"expected {B} beside {name + A}, found none; {_REWRITE}"
    elif b_OR.ndim == 2 and b_OR.shape[1] != a_RD.shape[0]:
        yield f"expected one rank at {name}, got {a_RD.shape[0]} and {b_OR.shape[1]}; {_REWRITE}"


def _on_base(lora: GgufLora, model: nn.Module) -> Iterator[str]:
    config = base_of(model).config
    architecture = architecture_of(config)
    name = architecture.name
    if lora.metadata.get("general.architecture") != name:
        found = lora.metadata.get("general.architecture")
        yield f"expected an adapter for {name}, got one for {found}; export it on its own base"
        return
    unknown = [one for one in lora.layers if layer_of(one) not in architecture.modules]
    if unknown:
        yield f"expected layers of {name}, got {', '.join(unknown)}; leave them out"
        return
    layers = find_targets(model).targets
    for layer, (a_RD, b_OR) in updates_of(lora, config).items():
        target = layers.get(layer)
        shape = (b_OR.shape[0], a_RD.shape[1])
        if target is None or shape != (target.out_features, target.in_features):
            yield f"expected a layer of the base, got {layer} of shape {list(shape)}; {_REWRITE}"
