"""Which checkpoint may be resumed from: a complete one, of the same run.

The trainer writes a checkpoint file by file, so that a kill leaves half of one. A marker file,
written last and atomically, lists the files with their sizes and says what run they belong to; a
folder without a valid marker is never read.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState

from forgetless.adapters.forms import form_of
from forgetless.atomic import write_atomically
from forgetless.errors import ArtefactError
from forgetless.models.load import model_fingerprint
from forgetless.training.options import TrainingOptions

MARKER = "forgetless.json"
ADAPTER_FILE = "adapter_model.safetensors"


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunIdentity(_Value):
    """What must be the same for a checkpoint to go on.

    Attributes:
        base: Fingerprint of the base model.
        adapter: Name of the adapter in the PEFT model.
        form: Which form holds it.
        rank: Its rank.
        frozen: Hash of the adapter's tensors that do not train (A0 of `b`, B0 of `a`, both of
            `both`), which PEFT would load, or miss, silently.
        data: Fingerprint of the train rows in their order.
        options: The training options that change the weights, and the seed.
    """

    base: str
    adapter: str
    form: str
    rank: int
    frozen: str
    data: str
    options: dict[str, Any]


class Marker(_Value):
    """The content of a checkpoint's marker file."""

    schema_version: Literal[1] = 1
    step: int
    resumed_from: tuple[int, ...]
    files: dict[str, int]
    identity: RunIdentity


def identity_of(
    model: PeftModel, adapter: str, *, data: str, options: TrainingOptions, seed: int
) -> RunIdentity:
    """Describe a run by its attached model, its data and its options, before the first step."""
    return RunIdentity(
        base=model_fingerprint(model),
        adapter=adapter,
        form=form_of(model, adapter).name,
        rank=model.peft_config[adapter].r,
        frozen=_frozen_hash(model, adapter),
        data=data,
        options={**options.identity(), "seed": seed},
    )


def write_marker(
    checkpoint: Path, identity: RunIdentity, *, step: int, resumed_from: tuple[int, ...]
) -> Path:
    """Declare a checkpoint complete, once all its files are synced to disk."""
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    marker = Marker(step=step, resumed_from=resumed_from, files=files, identity=identity)
    return write_atomically(checkpoint / MARKER, marker.model_dump_json(indent=1))


def read_marker(checkpoint: Path) -> Marker | None:
    """The marker of a complete checkpoint; None where it, or a file, is missing or damaged."""
    try:
        marker = Marker.model_validate_json((checkpoint / MARKER).read_bytes())
        sizes = {name: (checkpoint / name).stat().st_size for name in marker.files}
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    return marker if sizes == marker.files else None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; incomplete ones are passed over."""
    complete = [path for path in _checkpoints(folder) if read_marker(path) is not None]
    return complete[-1] if complete else None


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete what a kill in the middle of a save left behind; returns what was deleted."""
    incomplete = [path for path in _checkpoints(folder) if read_marker(path) is None]
    for path in incomplete:
        shutil.rmtree(path)
    return incomplete


def refuse_other_run(checkpoint: Path, marker: Marker, identity: RunIdentity) -> None:
    """Refuse to go on from a checkpoint of another model, adapter, data or options.

    Raises:
        ArtefactError: Names each thing that differs.
    """
    old, new = _flat(marker.identity), _flat(identity)
    differing = [
        f"{name} (checkpoint {_shown(old.get(name))}, this run {_shown(new.get(name))})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise ArtefactError(
            f"{checkpoint}: expected a checkpoint of this run, got one that differs in "
            f"{', '.join(differing)}; give another output folder, or remove this one to start anew"
        )


def refuse_silent_loss(model: PeftModel, adapter: str, checkpoint: Path) -> None:
    """Check that every tensor of the checkpoint is in the model, and nothing else: PEFT does not.

    Raises:
        ArtefactError: A tensor is missing, unexpected or different.
    """
    folder = checkpoint if adapter == "default" else checkpoint / adapter
    try:
        saved = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{folder / ADAPTER_FILE}: expected a readable adapter, got: {error}; remove "
            f"{checkpoint} to resume from the checkpoint before it"
        ) from error
    loaded = adapter_tensors(model, adapter)
    for name in sorted(saved.keys() | loaded.keys()):
        if name not in saved or name not in loaded:
            where = "the checkpoint" if name in saved else "the model"
            raise ArtefactError(
                f"{checkpoint}: expected the tensors of this adapter's form, got {name} in {where} "
                "only; give another output folder, or remove this one to start anew"
            )
        if not torch.equal(saved[name], loaded[name].to("cpu", saved[name].dtype)):
            raise ArtefactError(f"{checkpoint}: {name} was not restored; remove it to start anew")


def load_finished(model: PeftModel, adapter: str, checkpoint: Path) -> TrainerState:
    """Load the adapter of a run that was trained to its end; returns where the trainer stood."""
    folder = checkpoint if adapter == "default" else checkpoint / adapter
    device = str(model.get_base_model().device)
    model.load_adapter(str(folder), adapter, is_trainable=True, torch_device=device)
    refuse_silent_loss(model, adapter, checkpoint)
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """All tensors of one adapter, trainable and frozen, under the names that a checkpoint uses."""
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _frozen_hash(model: PeftModel, adapter: str) -> str:
    trainable = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    state = hashlib.sha256()
    for name, tensor in sorted(adapter_tensors(model, adapter).items()):
        if tensor.data_ptr() not in trainable:
            state.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
            state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step."""
    steps = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [steps[step] for step in sorted(steps)]


def _flat(identity: RunIdentity) -> dict[str, Any]:
    values = identity.model_dump(mode="json")
    options = {f"training.{name}": value for name, value in values.pop("options").items()}
    return values | options


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
