"""What a run is, so that a checkpoint of it can be told from one of another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from forgetless.adapters.forms import adapted_layers, form_of
from forgetless.errors import TrainingError
from forgetless.models.load import model_fingerprint
from forgetless.training.options import TrainingOptions


class RunIdentity(BaseModel):
    """What must be the same for a checkpoint to go on.

    Attributes:
        base: Fingerprint of the base model.
        adapter: Name of the adapter in the PEFT model.
        form: Which form holds it.
        rank: Its rank.
        alpha: Its alpha.
        scaling: The factor on ΔW, of all layers; a hash of the factors where layers differ.
        start: What the adapter's start follows from, as `attach` tells it; where nobody told, a
            hash of the tensors that do not train (A0 of `b`, B0 of `a`, both of `both`).
        data: Fingerprint of the train rows in their order.
        options: The training options that change the weights, with bf16 as the hardware decided
            it, and the seed.
        device: Type of device that it runs on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    adapter: str
    form: str
    rank: int
    alpha: float
    scaling: str
    start: str
    data: str
    options: dict[str, Any]
    device: str

    def flat(self) -> dict[str, Any]:
        """All values by name; the options begin with `training.`."""
        values = self.model_dump(mode="json")
        options = {f"training.{name}": value for name, value in values.pop("options").items()}
        return values | options


def identity_of(
    described: Mapping[str, Any],
    device: torch.device,
    *,
    data: str,
    options: TrainingOptions,
    seed: int,
) -> RunIdentity:
    """Describe a run by what it trains, its data and its options, before the first step."""
    return RunIdentity(
        **described,
        data=data,
        options={**options.identity(), "bf16": options.uses_bf16(device), "seed": seed},
        device=device.type,
    )


def describe_adapter(model: PeftModel, adapter: str, start: str | None) -> dict[str, Any]:
    """What an adapter contributes to the identity of a run.

    `start` names what the adapter's start follows from. The checkpoint holds the start itself: a
    resume takes it from there, as the same solve with another number of threads ends in other bits.
    """
    config = model.peft_config[adapter]
    return {
        "base": model_fingerprint(model),
        "adapter": adapter,
        "form": form_of(model, adapter).name,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "scaling": _scaling(model, adapter),
        "start": _frozen_hash(model, adapter) if start is None else start,
    }


def active_adapter(model: PeftModel) -> str:
    """Name of the one adapter that is on.

    Raises:
        TrainingError: Several, or none.
    """
    adapters = list(model.active_adapters)
    if len(adapters) != 1:
        raise TrainingError(
            f"training: expected one active adapter, got {', '.join(adapters) or 'none'}; call "
            "model.set_adapter(name)"
        )
    return str(adapters[0])


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """All tensors of one adapter, trainable and frozen, under the names that a checkpoint uses."""
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _scaling(model: PeftModel, adapter: str) -> str:
    layers = adapted_layers(model, adapter)
    factors = {name: layer.scaling[adapter] for name, layer in layers.items()}
    if len(set(factors.values())) == 1:
        return f"{next(iter(factors.values()))}"
    return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()[:16]


def _frozen_hash(model: PeftModel, adapter: str) -> str:
    trainable = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    state = hashlib.sha256()
    for name, tensor in sorted(adapter_tensors(model, adapter).items()):
        if tensor.data_ptr() not in trainable:
            state.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
            state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]
