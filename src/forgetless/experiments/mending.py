"""What a finished run leaves for its user, made again where it is gone or damaged."""

from __future__ import annotations

from pathlib import Path

from forgetless.adapters.round_trip import PROBE_TEXT
from forgetless.errors import ArtefactError
from forgetless.experiments.base_model import load_base
from forgetless.experiments.output import RunFolder
from forgetless.experiments.product import Product, product_of
from forgetless.experiments.progress import Progress, warnings_heard
from forgetless.experiments.record import Record
from forgetless.experiments.report import is_whole_report, write_report
from forgetless.recipe import Recipe
from forgetless.training.checkpoint import latest_checkpoint, read_marker
from forgetless.training.quiet import libraries_quiet


def mend(recipe: Recipe, folder: RunFolder, record: Record, heard: Progress) -> None:
    """Write the report from the record, and export anew from the last checkpoint, where needed.

    Raises:
        ArtefactError: What was exported is gone or damaged, and so is the last checkpoint.
    """
    if not is_whole_report(folder.report):
        heard.note(f"{folder.report} is gone or damaged; it is written again, from the record")
        write_report([record], folder.report)
    product = product_of(record.method, folder)
    fault = product.fault()
    if fault is None:
        return
    checkpoint = _trained(folder, record)
    if checkpoint is None:
        raise ArtefactError(
            f"{product.folder}: expected the exported {product.noun}, got {fault}, and no "
            f"checkpoint of step {record.training.steps} to export it from; copy the "
            f"{product.noun} back, or train again with output= set to another folder (the record "
            "and the report here stay valid)"
        )
    heard.note(
        f"{product.folder} is gone or damaged ({fault}); it is exported again, from {checkpoint}"
    )
    _export(recipe, checkpoint, product, heard)
    product.write_card(record)


def _trained(folder: RunFolder, record: Record) -> Path | None:
    """The complete checkpoint of the run's last step."""
    newest = latest_checkpoint(folder.checkpoints)
    marker = None if newest is None else read_marker(newest)
    return newest if marker is not None and marker.step == record.training.steps else None


def _export(recipe: Recipe, checkpoint: Path, product: Product, heard: Progress) -> None:
    with libraries_quiet(), warnings_heard(heard.warn):
        with heard.phase("load"):
            loaded = load_base(recipe, heard)
            model = product.trained(loaded, checkpoint)
        with heard.phase("export"):
            probe = loaded.tokenizer(PROBE_TEXT, return_tensors="pt").input_ids.to(loaded.device)
            product.write(model, loaded, probe)
