"""Write and read one LoRA as a GGUF file, by the names of a transformers model's layers."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from forgetless.adapters.gguf.architectures import NAME, architecture_of
from forgetless.errors import AdapterError, ArtefactError

GGUF = "adapter.gguf"
A, B = ".lora_a", ".lora_b"
_WEIGHT = ".weight"
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class GgufLora:
    """What a file holds.

    Attributes:
        metadata: Keys and values.
        tensors: By GGUF's names, A (R, D) and B (O, R).
    """

    metadata: Mapping[str, object]
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """Largest of a layer."""
        return max((t.shape[0] for n, t in self.tensors.items() if n.endswith(A)), default=0)

    @property
    def layers(self) -> list[str]:
        """GGUF's names of the adapted weights."""
        return [name.removesuffix(A) for name in self.tensors if name.endswith(A)]


def gguf_package() -> ModuleType:
    """The package `gguf`, imported on first use.

    Raises:
        AdapterError: It is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise AdapterError(
            f"target {NAME}: expected the package gguf, which writes and reads the file, got "
            "none; pip install 'forgetless[llama-cpp]'"
        ) from error


def write_lora(
    path: Path,
    updates: Mapping[str, tuple[Tensor, Tensor]],
    config: PreTrainedConfig,
    *,
    base: str | None = None,
    revision: str | None = None,
) -> None:
    """Write factors of one rank, in float32; llama.cpp multiplies by alpha / rank, which is 1.

    Args:
        path: The file.
        updates: By module name, A (R, D) and B (O, R), all of the same R.
        config: The base model's.
        base: Its name in public, recorded.
        revision: Its revision.

    Raises:
        AdapterError: An architecture or a layer that is not known, or no package `gguf`.
    """
    gguf, architecture = gguf_package(), architecture_of(config)
    names = gguf_names(config, updates)
    rank = next(iter(updates.values()))[0].shape[0]
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        if base:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base)
            if revision:
                writer.add_base_model_version(0, revision)
        for module, (a_RD, b_OR) in updates.items():
            order = architecture.row_orders.get(layer_of(names[module]))
            if order is not None:
                b_OR = order.to_gguf(b_OR, order.heads(config))
            for suffix, tensor in ((A, a_RD), (B, b_OR)):
                values = tensor.detach().float().cpu().contiguous().numpy()
                writer.add_tensor(names[module] + suffix, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def gguf_names(config: PreTrainedConfig, modules: Iterable[str]) -> dict[str, str]:
    """GGUF's name of each module's weight, by the package's own table.

    Raises:
        AdapterError: An architecture or a layer that is not known, or no package `gguf`.
    """
    gguf, architecture = gguf_package(), architecture_of(config)
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, str] = {}
    for module in modules:
        name = table.get_name(module + _WEIGHT, try_suffixes=(_WEIGHT,))
        if name is None or layer_of(name) not in architecture.modules:
            raise AdapterError(
                f"target {NAME}: expected layers that llama.cpp's {architecture.name} has, got "
                f"{module}; leave it out of target_modules, or export with --target peft"
            )
        found[module] = name
    return found


def layer_of(name: str) -> str:
    """`attn_q` of `blk.3.attn_q.weight`; the whole name where it belongs to no block."""
    found = _BLOCK.fullmatch(name)
    return name if found is None else found.group(2)


def read_lora(path: Path) -> GgufLora:
    """Read a GGUF file whole.

    Raises:
        AdapterError: No such file, or no package `gguf`.
        ArtefactError: It is damaged, or no GGUF file.
    """
    gguf = gguf_package()
    if not path.is_file():
        raise AdapterError(f"{path}: expected a GGUF file, found none; check the path")
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ArtefactError(f"{path}: expected a GGUF file, which begins with GGUF, got {magic!r}")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {
            entry.name: torch.from_numpy(gguf.dequantize(entry.data, entry.tensor_type).copy())
            for entry in reader.tensors
        }
    except (IndexError, KeyError, ValueError, NotImplementedError) as error:  # a short or odd file
        raise ArtefactError(f"{path}: truncated or damaged ({error}); copy it again") from error
    return GgufLora(metadata, tensors)


def updates_of(lora: GgufLora, config: PreTrainedConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module name, rows in the order of transformers, alpha / rank folded into B.

    Names and row orders are undone by other tables and formulas than they were made with.

    Raises:
        AdapterError: An architecture that is not known, or a tensor that is no part of it.
        ArtefactError: A without B.
    """
    architecture = architecture_of(config)
    alpha = lora.metadata.get("adapter.lora.alpha")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in lora.layers:
        block = _BLOCK.fullmatch(name)
        if block is None or block.group(2) not in architecture.modules:
            raise AdapterError(f"{name}: expected a layer of {architecture.name}, got another one")
        if name + B not in lora.tensors:
            raise ArtefactError(f"{name}: expected {A} and {B}, got {A} only; write the file again")
        a_RD, b_OR = lora.tensors[name + A], lora.tensors[name + B]
        order = architecture.row_orders.get(block.group(2))
        if order is not None:
            b_OR = order.from_gguf(b_OR, order.heads(config))
        if isinstance(alpha, int | float) and alpha != 0:  # llama.cpp takes 0 for no scale
            b_OR = b_OR * (alpha / a_RD.shape[0])
        found[architecture.modules[block.group(2)].format(block.group(1))] = (a_RD, b_OR)
    return found
