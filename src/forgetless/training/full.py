"""Full fine-tuning: every parameter of a copy of the base trains, beside the base.

The copy is float32, so that a small step is not lost in the rounding of a large weight. Weight
decay pulls to the base: W' ← W' - ηλ (W' - W) before each step of AdamW, which is AdamW's own
decoupled decay of ΔW. Source of a pull to the start: L2-SP, arXiv:1802.01483.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from forgetless.errors import ArtefactError, TrainingError
from forgetless.methods.base import Held
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.pair import TunedPair, own_tensors
from forgetless.training.options import TrainingOptions
from forgetless.training.subject import Subject

WEIGHTS = "full_model.safetensors"


def copied(base: PreTrainedModel) -> TunedPair:
    """A float32 copy to train, beside the base itself.

    Raises:
        ModelError: A quantised base.
        AdapterError: One that holds live adapters.
    """
    tuned = copy.deepcopy(base).to(torch.float32).requires_grad_(True)
    tuned.config.dtype = torch.float32
    return TunedPair(tuned, base.requires_grad_(False))


class FullSubject(Subject):
    """Every weight of the tuned model of a pair."""

    noun = "the model"

    def __init__(self, pair: TunedPair, options: TrainingOptions) -> None:
        """Take the pair, both models the same at step 0.

        Raises:
            TrainingError: An option that is about adapters.
        """
        if options.lora_plus_ratio is not None:
            raise TrainingError(
                "training.lora_plus_ratio: expected none with method full, which has no B, got "
                f"{options.lora_plus_ratio:g}; leave it out"
            )
        self._pair = self.whole = pair
        self.model = pair.tuned
        self.adapter = ""

    @property
    def form(self) -> Held:
        """No adapter."""
        return "full"

    def described(self, start: str | None) -> Mapping[str, Any]:
        """By the base: the copy starts there."""
        return {
            "base": model_fingerprint(self._pair.base),
            "adapter": "",
            "form": "full",
            "rank": 0,
            "alpha": 0.0,
            "scaling": "1",
            "start": start or "the base",
        }

    def watched(self) -> Mapping[str, nn.Module]:
        """The model as a whole: a tower that text does not reach may rightly get no gradient."""
        return {"(the whole model)": self._pair.tuned}

    def has_moved(self) -> bool:
        """Compares with the base."""
        base = own_tensors(self._pair.base)
        return any(
            not torch.equal(tensor, base[name].to(tensor.dtype))
            for name, tensor in own_tensors(self._pair.tuned).items()
        )

    def save(self, folder: Path, *, is_main_process: bool, **options: Any) -> None:
        """All weights under their live names, tied ones once."""
        if is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = own_tensors(self._pair.tuned)
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / WEIGHTS)

    def in_one_piece(self) -> dict[str, Tensor]:
        """Never: it trains beside its base, which is whole in every process."""
        raise TrainingError(
            "training: expected a model in one piece for method full, got a launcher that shards "
            "it (FSDP, DeepSpeed); start it without, as plain data parallel training, or train an "
            "adapter"
        )

    def load(self, checkpoint: Path) -> None:
        """Every tensor in place."""
        load_weights(self._pair.tuned, checkpoint)

    def made_ready(self) -> None:
        """Nothing is cast: it is float32, and not quantised."""

    def optimiser_decay(self, options: TrainingOptions) -> float:
        """None: AdamW's own would pull to 0."""
        return 0.0

    def callbacks(self, options: TrainingOptions) -> Sequence[TrainerCallback]:
        """Decay to the base, where it is asked for."""
        return [DecayToBase(self._pair, options.weight_decay)] if options.weight_decay else []


def load_weights(tuned: PreTrainedModel, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the model.

    Raises:
        ArtefactError: A file that cannot be read, or tensors of another model.
    """
    try:
        saved = load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{checkpoint / WEIGHTS}: expected readable weights, got: {error}; remove {checkpoint} "
            "to resume from the checkpoint before it"
        ) from error
    mine = own_tensors(tuned)
    for name in sorted(saved.keys() | mine.keys()):
        if name not in saved or name not in mine or saved[name].shape != mine[name].shape:
            raise ArtefactError(
                f"{checkpoint}: expected the tensors of this model, got another {name}; give "
                "another output folder, or remove this one to start anew"
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(saved[name])


class DecayToBase(TrainerCallback):
    """Decoupled weight decay of W' - W, at the rate of the step that follows."""

    def __init__(self, pair: TunedPair, weight_decay: float) -> None:
        """Take the pair and λ."""
        base = own_tensors(pair.base)
        named = pair.tuned.named_parameters()
        self._pairs = [(parameter, base[name]) for name, parameter in named]
        self._weight_decay = weight_decay

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any
    ) -> None:
        """Before AdamW moves anything, as its own decay acts."""
        rate = found["optimizer"].param_groups[0]["lr"]
        with torch.no_grad():
            for parameter, base in self._pairs:
                parameter.lerp_(base.to(parameter.dtype), rate * self._weight_decay)
