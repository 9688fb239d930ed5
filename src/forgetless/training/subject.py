"""What a run trains: an adapter, or every weight of a copy of the base.

The trainer, checkpoints and callbacks ask for no more than this: what to train, what says that it
is the same run, what is saved and restored, and what is watched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from forgetless.adapters.forms import adapted_layers, align_adapter_dtype, form_of
from forgetless.methods.base import Held
from forgetless.models.pair import TunedModel
from forgetless.models.placement import whole
from forgetless.models.state import trainable_copy
from forgetless.models.targets import base_of
from forgetless.training.checkpoint import load_adapter_of
from forgetless.training.identity import active_adapter, describe_adapter
from forgetless.training.options import TrainingOptions


class Subject(ABC):
    """What is trained.

    Attributes:
        noun: What it is called in a message.
        whole: It with its base, which is what `disable_adapter()` gives.
        model: What the trainer is given.
        adapter: Name of the adapter; empty where there is none.
    """

    noun: ClassVar[str]
    whole: TunedModel
    model: nn.Module
    adapter: str

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model that computes."""
        return base_of(self.whole)

    @property
    @abstractmethod
    def form(self) -> Held:
        """What trains."""

    @abstractmethod
    def described(self, start: str | None) -> Mapping[str, Any]:
        """Base, adapter, form, rank, alpha, scaling and start, as `RunIdentity` holds them."""

    @abstractmethod
    def watched(self) -> Mapping[str, nn.Module]:
        """What must each get a gradient, by name."""

    @abstractmethod
    def has_moved(self) -> bool:
        """Whether any trainable tensor is another than at the start."""

    @abstractmethod
    def save(self, folder: Path, *, is_main_process: bool, **options: Any) -> None:
        """Write all that a resume needs of the weights."""

    @abstractmethod
    def in_one_piece(self) -> dict[str, Tensor]:
        """All that `save` writes, where each process holds a part of it; every one must ask.

        Raises:
            TrainingError: It cannot be trained so.
        """

    @abstractmethod
    def load(self, checkpoint: Path) -> None:
        """Read it back.

        Raises:
            ArtefactError: Not every tensor is there, or one that is not expected.
        """

    @abstractmethod
    def made_ready(self) -> None:
        """Undo what the trainer's construction did to the weights."""

    def optimiser_decay(self, options: TrainingOptions) -> float:
        """What AdamW itself decays by."""
        return options.weight_decay

    def callbacks(self, options: TrainingOptions) -> Sequence[TrainerCallback]:
        """What else acts around an optimiser step."""
        return ()


class AdapterSubject(Subject):
    """The one active adapter of a PeftModel."""

    noun = "the adapter"

    def __init__(self, model: PeftModel) -> None:
        """Take the model as it is at step 0.

        Raises:
            TrainingError: Several active adapters, or none.
        """
        self._model = self.whole = self.model = model
        self.adapter = active_adapter(model)
        self._start = trainable_copy(model)

    @property
    def form(self) -> Held:
        """How PEFT holds it."""
        return form_of(self.model, self.adapter).name

    def described(self, start: str | None) -> Mapping[str, Any]:
        """By its configuration; without `start`, by a hash of the tensors that do not train."""
        return describe_adapter(self._model, self.adapter, start)

    def watched(self) -> Mapping[str, nn.Module]:
        """Every adapted layer: one that never calls its adapter would train nothing, silently."""
        return adapted_layers(self.model, self.adapter)

    def has_moved(self) -> bool:
        """Compares with a copy."""
        now = dict(self.model.named_parameters())
        # A trainer may have cast them meanwhile: rounding is no movement.
        pairs = [(now[name].cpu(), tensor) for name, tensor in self._start.items()]
        return any(bool((end != tensor.to(end.dtype)).any()) for end, tensor in pairs)

    def save(self, folder: Path, *, is_main_process: bool, **options: Any) -> None:
        """The adapter alone, as PEFT does."""
        self._model.save_pretrained(
            str(folder),
            selected_adapters=[self.adapter],
            save_embedding_layers=False,
            is_main_process=is_main_process,
            **options,
        )

    def in_one_piece(self) -> dict[str, Tensor]:
        """A layer's tensors at a time; the base is not gathered."""
        named = self._model.named_parameters()
        return {name: whole(p).detach().cpu() for name, p in named if ".lora_" in name}

    def load(self, checkpoint: Path) -> None:
        """Through PEFT, and every tensor compared: it passes missing ones over."""
        load_adapter_of(self._model, self.adapter, checkpoint)

    def made_ready(self) -> None:
        """TRL casts the trainable tensors of quantised models, and only those."""
        align_adapter_dtype(self.model, self.adapter)
