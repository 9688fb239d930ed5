"""What lies in an adapter folder, read without its base: exact factors, layer by layer."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forgetless.adapters.load import CONFIG, WEIGHTS, read_adapter_config
from forgetless.adapters.variant import FIXED_A, FIXED_B
from forgetless.errors import AdapterError, ArtefactError
from forgetless.linalg.lowrank import concatenated_delta, isometric_core

_PREFIX = "base_model.model."
_NAMES = ("lora_A", "lora_B", FIXED_A, FIXED_B)


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A LoRA adapter on disk.

    Attributes:
        config: `adapter_config.json`.
        ranks: Rows of A, by layer.
        is_both: Whether it is a checkpoint of the form `both`, which PEFT alone refuses.
        parameters: Numbers in the file.
        dtypes: Of its tensors, as safetensors calls them.
        norms: ‖ΔW‖_F by layer, scale included.
        others: Names of tensors that are no LoRA on a linear layer.
    """

    config: dict[str, Any]
    ranks: dict[str, int]
    is_both: bool
    parameters: int
    dtypes: tuple[str, ...]
    norms: dict[str, float]
    others: tuple[str, ...]

    @property
    def update_norm(self) -> float:
        """‖ΔW‖_F over all layers together."""
        return math.hypot(*self.norms.values())


def read_stored(folder: Path) -> StoredAdapter:
    """Describe a LoRA adapter of any origin; no more than one layer is in memory at a time.

    Raises:
        AdapterError: No adapter there, not LoRA, or not saved as safetensors.
        ArtefactError: A truncated or damaged file.
    """
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder / CONFIG}: expected peft_type LORA, got {config.get('peft_type')}; only LoRA "
            "can be described"
        )
    with _opened(folder) as file:
        keys = list(file.keys())
        slices = [file.get_slice(key) for key in keys]
        layers = sorted(
            key.removesuffix(".lora_A.weight")
            for key, part in zip(keys, slices, strict=True)
            if key.endswith(".lora_A.weight") and len(part.get_shape()) == 2
        )
        known = {f"{layer}.{name}.weight" for layer in layers for name in _NAMES}
        norms, ranks = {}, {}
        for layer in layers:
            name = layer.removeprefix(_PREFIX)
            ranks[name] = int(file.get_slice(f"{layer}.lora_A.weight").get_shape()[0])
            norms[name] = float(isometric_core(*_factors(file, layer, set(keys), config)).norm())
        return StoredAdapter(
            config=config,
            ranks=ranks,
            is_both=any(f".{FIXED_A}." in key for key in keys),
            parameters=sum(math.prod(part.get_shape()) for part in slices),
            dtypes=tuple(sorted({str(part.get_dtype()) for part in slices})),
            norms=norms,
            others=tuple(sorted(set(keys) - known)),
        )


def _factors(
    file: Any, layer: str, keys: set[str], config: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """A (R, D) and B (O, R) with ΔW = B A, in float64, the scale folded into B."""
    found = {
        name: file.get_tensor(key).to(torch.float64)
        for name in _NAMES
        if (key := f"{layer}.{name}.weight") in keys
    }
    if "lora_B" not in found or (FIXED_A in found) != (FIXED_B in found):
        raise ArtefactError(f"layer {layer}: expected lora_A and lora_B, got {', '.join(found)}")
    a_RD, b_OR = found["lora_A"], found["lora_B"]
    scale = _scale(config, layer.removeprefix(_PREFIX), a_RD.shape[0])
    if FIXED_A in found:
        a_RD, b_OR = concatenated_delta(a_RD, b_OR, found[FIXED_A], found[FIXED_B])
    return a_RD, b_OR * scale


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Alpha / rank of a layer, by PEFT's rules: patterns, and the root of the rank for rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha", rank))
    if rank < 1 or not isinstance(alpha, int | float):
        raise ArtefactError(
            f"layer {layer}: expected a rank and a numeric lora_alpha, got {rank} and {alpha!r}; "
            "save the adapter again"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder}: expected {WEIGHTS}, found none; save it as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: truncated or damaged ({error}); copy it again") from error
