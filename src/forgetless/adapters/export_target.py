"""What an export target is: something that writes an adapter somewhere and can compare it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forgetless.adapters.card import CardFacts
from forgetless.adapters.round_trip import RoundTrip


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One adapter to write.

    Attributes:
        model: Holds it, in any of our forms, or as any PEFT LoRA on linear layers.
        folder: Where to write; made where it does not exist.
        adapter: Which adapter.
        scale: Factor on ΔW.
        base_name: Base model id to record; that of the model where None.
        revision: Its revision.
        tokenizer: Written beside a whole model.
        checkpoint_dtype: Of the base's own files, which may be narrower than the live model.
        card: What the model card tells beside the adapter's own configuration.
    """

    model: PeftModel
    folder: Path
    adapter: str = "default"
    scale: float = 1.0
    base_name: str | None = None
    revision: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    checkpoint_dtype: torch.dtype | None = None
    card: CardFacts = field(default_factory=CardFacts)


class ExportTarget(ABC):
    """Stateless. A further one is a subclass and an entry of `EXPORT_TARGETS`.

    Attributes:
        name: As `--target` calls it.
        is_adapter: Whether what it writes is loaded beside the base.
        is_peft: Whether PEFT loads it.
    """

    name: str
    is_adapter: ClassVar[bool] = True
    is_peft: ClassVar[bool] = True

    def check(self, job: ExportJob) -> None:  # noqa: B027  # most have nothing to refuse so early
        """Refuse what can be known before anything is calibrated or written.

        Raises:
            AdapterError: What the target cannot take, with the remedy.
        """

    @abstractmethod
    def write(self, job: ExportJob) -> torch.dtype:
        """Write, whole or not at all; the live model is not changed.

        Returns:
            The dtype of the weights written.

        Raises:
            AdapterError: What the target cannot take, with the remedy; a folder not writable.
        """

    @abstractmethod
    def compare(self, job: ExportJob, input_ids_BT: Tensor) -> RoundTrip:
        """Load what was written and compare it with the live adapter; leaves the model as found.

        Raises:
            AdapterError: The logits differ by more than rounding explains.
        """

    @abstractmethod
    def summary(self, rank: int, dtype: torch.dtype) -> str:
        """What became of an update of `rank` whose weights were written in `dtype`."""
