"""What a finished run leaves for its user, made again where it is gone or damaged."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from forgetless.adapters.card import write_card
from forgetless.adapters.export import export
from forgetless.adapters.load import WEIGHTS, load_adapter, read_adapter_config
from forgetless.adapters.round_trip import PROBE_TEXT, check_round_trip
from forgetless.errors import ArtefactError, ForgetlessError
from forgetless.experiments.base_model import load_base
from forgetless.experiments.model_card import card_facts
from forgetless.experiments.output import RunFolder
from forgetless.experiments.progress import Progress, warnings_heard
from forgetless.experiments.record import Record
from forgetless.experiments.report import is_whole_report, write_report
from forgetless.models.load import base_reference
from forgetless.recipe import Recipe
from forgetless.training.checkpoint import latest_checkpoint, read_marker
from forgetless.training.quiet import libraries_quiet


def mend(recipe: Recipe, folder: RunFolder, record: Record, heard: Progress) -> None:
    """Write the report from the record, and export the adapter from its checkpoint, where needed.

    Raises:
        ArtefactError: The adapter is gone or damaged, and so is its last checkpoint.
    """
    if not is_whole_report(folder.report):
        heard.note(f"{folder.report} is gone or damaged; it is written again, from the record")
        write_report([record], folder.report)
    fault = _adapter_fault(folder.adapter)
    if fault is None:
        return
    checkpoint = _trained(folder, record)
    if checkpoint is None:
        raise ArtefactError(
            f"{folder.adapter}: expected the exported adapter, got {fault}, and no checkpoint of "
            f"step {record.training.steps} to export it from; copy the adapter back, or train "
            "again with output= set to another folder (the record and the report here stay valid)"
        )
    heard.note(
        f"{folder.adapter} is gone or damaged ({fault}); it is exported again, from {checkpoint}"
    )
    _export(recipe, checkpoint, folder.adapter, heard)
    write_card(folder.adapter, card_facts(record))


def _adapter_fault(folder: Path) -> str | None:
    """What is wrong with an exported adapter; None where it opens and is as long as it says."""
    if not folder.is_dir():
        return "no folder"
    try:
        read_adapter_config(folder)
        with safe_open(folder / WEIGHTS, framework="pt") as tensors:
            return None if tensors.keys() else "no tensors"
    except ForgetlessError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"{WEIGHTS}: {str(error).strip()}"


def _trained(folder: RunFolder, record: Record) -> Path | None:
    """The complete checkpoint of the run's last step."""
    newest = latest_checkpoint(folder.checkpoints)
    marker = None if newest is None else read_marker(newest)
    return newest if marker is not None and marker.step == record.training.steps else None


def _export(recipe: Recipe, checkpoint: Path, adapter: Path, heard: Progress) -> None:
    with libraries_quiet(), warnings_heard(heard.warn):
        with heard.phase("load"):
            loaded = load_base(recipe, heard)
            model = load_adapter(loaded.model, checkpoint)
        with heard.phase("export"):
            name = base_reference(loaded.name)
            export(model, adapter, base_name=name, revision=loaded.revision)
            probe = loaded.tokenizer(PROBE_TEXT, return_tensors="pt").input_ids.to(loaded.device)
            check_round_trip(model, adapter, probe)
