"""A model of which any weight may have been tuned, beside the base that it came from.

It stands where a PeftModel stands: `disable_adapter()` is the base. Inside that block the tuned
model's tensors are those of the base, so that whoever holds the model, wrapped by a trainer or not,
sees the base through it, and one forward pass is as good as the other.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from forgetless.errors import ModelError
from forgetless.models.fingerprint import what_computes
from forgetless.models.quantization import quantization_of
from forgetless.models.untouched import refuse_touched_base

# Parts of configuration keys that say how to train, and nothing of evaluation.
_OF_TRAINING = ("dropout", "pdrop", "initializer", "init_")


class TunedPair(nn.Module):
    """Two copies of one architecture: `tuned`, and `base`, which is never written to."""

    def __init__(self, tuned: PreTrainedModel, base: PreTrainedModel) -> None:
        """Pair them by the names of their tensors.

        Raises:
            ModelError: One object twice, two architectures, other shapes, devices, or quantised
                weights.
            AdapterError: One of them holds live adapters.
        """
        super().__init__()
        _refuse_unlike(tuned, base)
        self.tuned = tuned
        self.base = base
        theirs = own_tensors(base) | dict(base.named_buffers())
        mine = own_tensors(tuned) | dict(tuned.named_buffers())
        # What no checkpoint holds (rotary frequencies) is rounded with the rest by a cast.
        self._pairs = [(tensor, theirs[name]) for name, tensor in mine.items() if name in theirs]

    def get_base_model(self) -> PreTrainedModel:
        """The transformers model that computes, as of a PeftModel."""
        return self.tuned

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the tuned model is the base, in the base's dtype."""
        with self._holding([base.data for _, base in self._pairs]):
            yield

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Inside the block every weight is W + factor (W' - W); a third copy, dropped afterwards.

        What is not a floating-point number stays as it was tuned.
        """
        with self._holding([_between(*pair, factor) for pair in self._pairs]):
            yield

    @contextmanager
    def _holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        before = [tensor.data for tensor, _ in self._pairs]
        try:
            self._hold(values)
            yield
        finally:
            self._hold(before)

    def _hold(self, values: Sequence[Tensor]) -> None:
        for (tensor, _), value in zip(self._pairs, values, strict=True):
            tensor.data = value
        # Autocast keeps casts of parameters by object, and has not seen that they are others now.
        torch.clear_autocast_cache()


TunedModel: TypeAlias = PeftModel | TunedPair


def reference_of(model: TunedModel) -> PeftModel | PreTrainedModel:
    """What holds the base's own weights: the base of a pair, or the model with its adapters."""
    return model.base if isinstance(model, TunedPair) else model


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a checkpoint holds, by name; live."""
    stored = model.state_dict().keys()
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor for name, tensor in named if name in stored}


def _between(tuned: Tensor, base: Tensor, factor: float) -> Tensor:
    if not tuned.is_floating_point():
        return tuned.data
    return torch.lerp(base.data.to(tuned.dtype), tuned.data, factor)


def _refuse_unlike(tuned: PreTrainedModel, base: PreTrainedModel) -> None:
    if tuned is base:
        raise ModelError(
            "base: expected another copy of the model, got the tuned model itself; load the base "
            "anew"
        )
    for what, model in (("model", tuned), ("base", base)):
        refuse_touched_base(model)
        kind = quantization_of(model.config)
        if kind is not None:
            raise ModelError(
                f"{what}: expected full-precision weights, got them quantised ({kind}), which "
                "cannot be compared weight by weight; load both in full precision"
            )
    _refuse_other_architecture(tuned, base)
    ours, theirs = own_tensors(tuned), own_tensors(base)
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(part[name].shape) if name in part else None for part in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"base: expected tensors of the tuned model's shapes, got {name} of shape "
                f"{shapes[1]}, tuned {shapes[0]}; give the base that it was tuned from"
            )
    if tuned.device != base.device:
        raise ModelError(
            f"base: expected the tuned model's device {tuned.device}, got {base.device}; move one "
            "of them"
        )


def _refuse_other_architecture(tuned: PreTrainedModel, base: PreTrainedModel) -> None:
    """What a configuration says of one architecture; what trainers note in it is not of that."""
    ours, theirs = what_computes(tuned), what_computes(base)
    known = type(base.config)().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    for key in ["class", "attention", *sorted(known & (ours.keys() | theirs.keys()))]:
        if any(part in key for part in _OF_TRAINING):
            continue
        if ours.get(key) != theirs.get(key):
            shown = [json.dumps(values.get(key), default=str) for values in (theirs, ours)]
            raise ModelError(
                f"base: expected the tuned model's architecture, got {key} {shown[0]}, tuned "
                f"{shown[1]}; give the base that it was tuned from, loaded in the same way"
            )
