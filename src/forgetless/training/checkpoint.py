"""Which checkpoint may be resumed from: a complete one, of the same run.

The trainer writes a checkpoint file by file, so that a kill leaves half of one. A marker file,
written last and atomically, lists the files with their sizes and says what run they belong to; a
folder without a valid marker is never read. A list beside the checkpoints names the steps whose
save was begun, so that half a checkpoint of ours can be told from one of another program, which is
never deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerState

from forgetless.atomic import write_atomically
from forgetless.errors import ArtefactError
from forgetless.models.placement import Sharding
from forgetless.training.identity import RunIdentity, adapter_tensors

MARKER = "forgetless.json"
STARTED = "forgetless-started.txt"
_SCHEMA = 3
ADAPTER_FILE = "adapter_model.safetensors"


class Marker(BaseModel):
    """The content of a checkpoint's marker file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[3] = 3
    step: int
    resumed_from: tuple[int, ...]
    files: dict[str, int]
    identity: RunIdentity


def write_started(folder: Path, step: int) -> None:
    """Note that the checkpoint of a step is ours, before the first file of it is written.

    The list lies beside the checkpoints, as a kill may also come while an old one is deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STARTED).open("a", encoding="utf-8") as file:
        file.write(f"{step}\n")
        file.flush()
        os.fsync(file.fileno())


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
    """The marker of a complete checkpoint; None where it, or a file, is missing or damaged.

    Raises:
        ArtefactError: The marker is whole but of another version of forgetless.
    """
    try:
        content = json.loads((checkpoint / MARKER).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    try:
        marker = Marker.model_validate(content)
    except ValidationError:
        version = content.get("schema_version") if isinstance(content, dict) else None
        raise ArtefactError(
            f"{checkpoint / MARKER}: expected a checkpoint of schema_version {_SCHEMA}, got "
            f"{version}, of another version of forgetless; give another output folder, or remove "
            "this one to start anew"
        ) from None
    try:
        sizes = {name: (checkpoint / name).stat().st_size for name in marker.files}
    except (FileNotFoundError, NotADirectoryError):
        return None
    return marker if sizes == marker.files else None


def sharding_of(marker: Marker) -> Sharding | None:
    """What had sharded the model: each keeps the optimiser in files of its own."""
    names = [name.split("/")[0] for name in marker.files]
    if any(name.startswith("global_step") for name in names):
        return "DeepSpeed"
    return "FSDP" if any(name.startswith("pytorch_model_fsdp") for name in names) else None


def resume_point(folder: Path, identity: RunIdentity) -> tuple[Path, Marker] | None:
    """Where a run goes on: the newest complete checkpoint in `folder`; None to start anew.

    What a kill in the middle of a save left behind is deleted, once nothing was refused.

    Raises:
        ArtefactError: `folder` holds a checkpoint of another run, program or version.
    """
    refuse_foreign(folder)
    newest = latest_checkpoint(folder)
    marker = None if newest is None else read_marker(newest)
    if newest is not None and marker is not None:
        refuse_other_run(newest, marker, identity)
    remove_incomplete(folder)
    return None if newest is None or marker is None else (newest, marker)


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder where another program keeps checkpoints: they would be deleted in turn.

    Raises:
        ArtefactError: Names the first of them.
    """
    for path in _checkpoints(folder):
        if read_marker(path) is None and not _is_ours(path):
            raise ArtefactError(
                f"{path}: expected a checkpoint of forgetless, got one of another program; choose "
                "another output folder"
            )


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; incomplete ones are passed over."""
    complete = [path for path in _checkpoints(folder) if read_marker(path) is not None]
    return complete[-1] if complete else None


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete what a kill in the middle of a save left behind; returns what was deleted.

    Only folders known to be ours: those whose save was begun by us, and empty ones.
    """
    incomplete = [
        path for path in _checkpoints(folder) if read_marker(path) is None and _is_ours(path)
    ]
    for path in incomplete:
        shutil.rmtree(path)
    return incomplete


def refuse_other_run(checkpoint: Path, marker: Marker, identity: RunIdentity) -> None:
    """Refuse to go on from a checkpoint of another model, adapter, data or options.

    Raises:
        ArtefactError: Names each thing that differs.
    """
    old, new = marker.identity.flat(), identity.flat()
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


def load_adapter_of(model: PeftModel, adapter: str, checkpoint: Path) -> None:
    """Load a checkpoint's adapter, and make sure of every tensor of it.

    Raises:
        ArtefactError: As `refuse_silent_loss`.
    """
    folder = checkpoint if adapter == "default" else checkpoint / adapter
    device = str(model.get_base_model().device)
    model.load_adapter(str(folder), adapter, is_trainable=True, torch_device=device)
    refuse_silent_loss(model, adapter, checkpoint)


def trained_state(checkpoint: Path) -> TrainerState:
    """Where the trainer stood."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _is_ours(checkpoint: Path) -> bool:
    """Whether forgetless made this folder, complete or not; an empty one belongs to nobody."""
    if (checkpoint / MARKER).exists() or not any(checkpoint.iterdir()):
        return True
    started = checkpoint.with_name(STARTED)
    steps = started.read_text(encoding="utf-8").split() if started.exists() else []
    return checkpoint.name.removeprefix("checkpoint-") in steps


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step."""
    steps = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [steps[step] for step in sorted(steps)]


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
