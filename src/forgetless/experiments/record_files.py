"""Records on disk: of one run, or of all runs that lie in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forgetless.errors import ArtefactError
from forgetless.experiments.record import Record, load_record

_NAME = "record.json"
_BEGUN = "recipe.yaml"  # what a run writes first


def records_in(paths: Sequence[Path]) -> list[Record]:
    """Read the records of runs, in the order of the paths; those of a folder by name.

    Args:
        paths: A record, a run's folder, a folder of such folders, or the folder of a sweep, whose
            unfinished runs have no record yet and are passed over.

    Raises:
        ArtefactError: A path that holds no record, or a record that is damaged.
    """
    return [load_record(file) for path in paths for file in _files(path)]


def unfinished_in(paths: Sequence[Path]) -> list[Path]:
    """Run folders that `records_in` passes over, as they have no record yet."""
    parents = [file.parent.parent for path in paths for file in _files(path)[:1] if _is_many(path)]
    begun = [file.parent for parent in parents for file in sorted(parent.glob(f"*/{_BEGUN}"))]
    return [folder for folder in begun if not (folder / _NAME).exists()]


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
