"""Records on disk: of one run, or of all runs that lie in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetless.errors import ArtefactError
from forgetless.experiments.record import Record, load_record

_NAME = "record.json"
_BEGUN = "recipe.yaml"  # what a run writes first


@dataclass(frozen=True)
class FoundRecords:
    """What lies under some paths.

    Attributes:
        records: In the order of the paths; those of a folder by name.
        left_out: One line for each run of a folder that has no record yet, or a damaged one.
    """

    records: list[Record]
    left_out: list[str]


def find_records(paths: Sequence[Path]) -> FoundRecords:
    """Read the records of runs.

    Args:
        paths: A record, a run's folder, a folder of such folders, or the folder of a sweep.

    Raises:
        ArtefactError: A path that holds no record, or that names a record that is damaged.
    """
    records: list[Record] = []
    left_out: list[str] = []
    for path in paths:
        files = _files(path)
        if not _is_many(path):
            records += [load_record(file) for file in files]
            continue
        begun = {file.parent for file in files[0].parent.parent.glob(f"*/{_BEGUN}")}
        for folder in sorted(begun - {file.parent for file in files}):
            left_out.append(f"{folder}: no record yet")
        for file in files:
            try:
                records.append(load_record(file))
            except ArtefactError as error:
                left_out.append(str(error))
    if not records:
        raise ArtefactError(left_out[0] if left_out else "report: expected a run, got no path")
    return FoundRecords(records, left_out)


def _is_many(path: Path) -> bool:
    return path.is_dir() and not (path / _NAME).exists()


def _files(path: Path) -> list[Path]:
    if not _is_many(path):
        return [path / _NAME if path.is_dir() else path]
    for pattern in (f"runs/*/{_NAME}", f"*/{_NAME}"):
        found = sorted(path.glob(pattern))
        if found:
            return found
    raise ArtefactError(
        f"{path}: expected the folder of a finished run, of several, or of a sweep, got one "
        f"without a {_NAME}; run its recipe first"
    )
