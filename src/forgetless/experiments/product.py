"""What a run leaves for others to load: a plain LoRA, or a whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forgetless.adapters.card import write_card
from forgetless.adapters.export import export
from forgetless.adapters.exported_files import WHOLE_MODEL
from forgetless.adapters.forms import peft_model_of
from forgetless.adapters.load import WEIGHTS, load_adapter, read_adapter_config
from forgetless.adapters.round_trip import check_round_trip
from forgetless.adapters.whole_folder import written_into
from forgetless.errors import AdapterError, ForgetlessError
from forgetless.experiments.model_card import card_facts
from forgetless.experiments.output import RunFolder
from forgetless.experiments.record import Record
from forgetless.methods import make_any_method
from forgetless.models.load import LoadedModel, base_reference
from forgetless.models.pair import TunedModel, TunedPair, own_tensors
from forgetless.training.full import copied, load_weights


class Product(ABC):
    """A folder beside the record.

    Attributes:
        noun: What is in it.
        folder: Where it lies.
    """

    noun: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def write(self, model: TunedModel, loaded: LoadedModel, probe: Tensor) -> dict[str, Any]:
        """Write it, reload it, and compare; returns what the record holds of that.

        Raises:
            AdapterError: It cannot be written, or is not what was trained.
        """

    @abstractmethod
    def fault(self) -> str | None:
        """What is wrong with it; None where it opens and is as long as it says."""

    @abstractmethod
    def trained(self, loaded: LoadedModel, checkpoint: Path) -> TunedModel:
        """The model of a checkpoint."""

    @abstractmethod
    def write_card(self, record: Record) -> None:
        """Its model card."""


def product_of(method: Mapping[str, Any], folder: RunFolder) -> Product:
    """That of a recipe's or a record's method."""
    is_full = make_any_method(method).form == "full"
    return _Model(folder.model) if is_full else _Adapter(folder.adapter)


class _Adapter(Product):
    noun = "adapter"

    def write(self, model: TunedModel, loaded: LoadedModel, probe: Tensor) -> dict[str, Any]:
        adapted = peft_model_of(model)
        name = base_reference(loaded.name)
        export(adapted, self.folder, base_name=name, revision=loaded.revision)
        check = check_round_trip(adapted, self.folder, probe)
        return {
            "folder": self.folder.name,
            "max_difference": check.max_difference,
            "max_logit": check.max_logit,
            "max_update_error": check.max_update_error,
        }

    def fault(self) -> str | None:
        if not self.folder.is_dir():
            return "no folder"
        try:
            read_adapter_config(self.folder)
        except ForgetlessError as error:
            return str(error)
        return _damage(self.folder / WEIGHTS)

    def trained(self, loaded: LoadedModel, checkpoint: Path) -> TunedModel:
        return load_adapter(loaded.model, checkpoint)

    def write_card(self, record: Record) -> None:
        write_card(self.folder, card_facts(record))


class _Model(Product):
    """In float32, as it was trained and measured: in bfloat16 small steps would round away."""

    noun = "model"

    def write(self, model: TunedModel, loaded: LoadedModel, probe: Tensor) -> dict[str, Any]:
        assert isinstance(model, TunedPair)
        with written_into(self.folder, "export", WHOLE_MODEL) as workplace:
            model.tuned.save_pretrained(str(workplace))
            loaded.tokenizer.save_pretrained(str(workplace))
        again = type(model.tuned).from_pretrained(
            self.folder, dtype=torch.float32, local_files_only=True
        )
        again = again.to(loaded.device).eval()
        written = own_tensors(again)
        for name, tensor in own_tensors(model.tuned).items():
            if name not in written or not torch.equal(tensor, written[name]):
                raise AdapterError(
                    f"export: {self.folder}: expected the trained weights, got another {name} "
                    "after reloading; do not use it, and report this"
                )
        with torch.no_grad():
            logits = [m(input_ids=probe, use_cache=False).logits for m in (model.tuned, again)]
        return {
            "folder": self.folder.name,
            "max_difference": float((logits[0] - logits[1]).abs().max()),
            "max_logit": float(logits[0].abs().max()),
            "max_update_error": 0.0,
        }

    def fault(self) -> str | None:
        if not WHOLE_MODEL.is_in(self.folder):
            return "no model"
        try:
            WHOLE_MODEL.check(self.folder)
        except ForgetlessError as error:
            return str(error)
        return None

    def trained(self, loaded: LoadedModel, checkpoint: Path) -> TunedModel:
        pair = copied(loaded.model)
        load_weights(pair.tuned, checkpoint)
        return pair

    def write_card(self, record: Record) -> None:
        write_card(self.folder, card_facts(record), config={}, merged=True)


def _damage(weights: Path) -> str | None:
    try:
        with safe_open(weights, framework="pt") as tensors:
            return None if tensors.keys() else "no tensors"
    except (OSError, SafetensorError) as error:
        return f"{weights.name}: {str(error).strip()}"
