"""The record of one run: everything that a reader needs to believe a figure, as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from forgetless.atomic import write_atomically
from forgetless.errors import ArtefactError
from forgetless.evaluation.results import EvaluationReport
from forgetless.training.results import LogPoint, TrainingFacts

__all__ = [
    "SCHEMA_VERSION",
    "DataFacts",
    "LayerStart",
    "LogPoint",
    "ModelFacts",
    "Record",
    "TrainingFacts",
    "load_record",
    "save_record",
]

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelFacts(_Part):
    """Which base model: as named in the recipe, and by content; `quantization` in words."""

    name: str
    revision: str | None
    fingerprint: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    quantization: str | None = None


class DataFacts(_Part):
    """Which rows stood for one role (`train`, `preserve`, or an evaluation item's name)."""

    role: str
    source: str
    fingerprint: str
    rows: int
    tokens: int
    truncated_rows: int


class LayerStart(_Part):
    """What the method found at one layer (eigenvalue counts, leakage at the start, …)."""

    site: str
    rank: int
    diagnostics: dict[str, float]


class Record(_Part):
    """One run. Figures are in `evaluation`; `scaled` holds the same adapter with ΔW scaled down.

    `phases` holds seconds by phase, `processor` those of processor time over all threads, `memory`
    the peak of the process and of its GPU in bytes (of the last attempt of a run that was resumed).
    `files` holds a hash of every data file and `model_files` a stamp of every file of a local
    model, so that a later run sees that one has changed.
    """

    schema_version: Literal[1] = 1
    label: str
    created: str
    seed: int
    method: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    hardware: dict[str, str]
    model: ModelFacts
    data: list[DataFacts]
    phases: dict[str, float]
    processor: dict[str, float] = {}
    memory: dict[str, float] = {}
    layers: dict[str, LayerStart]
    skipped_layers: dict[str, str]
    warnings: list[str]
    training: TrainingFacts
    evaluation: EvaluationReport
    scaled: list[EvaluationReport] = []
    export: dict[str, Any] = {}
    files: dict[str, str] = {}
    model_files: dict[str, str] = {}


def save_record(record: Record, path: Path) -> Path:
    """Write a record as JSON; a reader sees the whole of it or none."""
    return write_atomically(path, record.model_dump_json(indent=1) + "\n")


def load_record(path: Path) -> Record:
    """Read a record back.

    Raises:
        ArtefactError: Missing, truncated, not a record, or of another schema version.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise ArtefactError(
            f"{path}: expected a readable record, got: {error.strerror}; check the path"
        ) from error
    except ValueError as error:  # no JSON, or no UTF-8
        if re.match(r"\s*\{\s*\"schema_version\"", text):
            raise ArtefactError(
                f"{path}: expected a whole record, got a truncated or damaged one ({error}); "
                "move it away and run its recipe again"
            ) from error
        raise _no_record(path) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version is None:
        raise _no_record(path)
    if version != SCHEMA_VERSION:
        raise ArtefactError(
            f"{path}: expected record schema {SCHEMA_VERSION}, got {version}; read it with the "
            "version of forgetless that wrote it, or run again"
        )
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(
            f"{path}: expected a complete record, {where}: {first['msg']}; run again"
        ) from error


def _no_record(path: Path) -> ArtefactError:
    return ArtefactError(
        f"{path}: expected a record.json, got something else; give the record.json of a run, or "
        "its folder"
    )
