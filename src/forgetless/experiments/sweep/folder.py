"""The folder of a sweep: run folders, and beside them what is known of each run's attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from forgetless.atomic import write_atomically
from forgetless.data.spec import DataSpec
from forgetless.errors import ArtefactError, RecipeError
from forgetless.experiments.checks import data_of, measured_files
from forgetless.experiments.data_files import hash_files
from forgetless.experiments.model_files import changed_model_files
from forgetless.experiments.output import SHOWING, completed, differing, plain_recipe
from forgetless.experiments.record import Record, load_record
from forgetless.recipe import Recipe

State = Literal["done", "running", "failed", "waiting"]


class SweepFolder:
    """Paths inside the output folder of a sweep.

    `runs/` holds ordinary run folders and nothing else, so that every verb takes them. `work/`
    holds, by the run's name, its lock, log, progress and the reason why it failed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = path / "sweep.yaml"
        self.runs = path / "runs"
        self.work = path / "work"

    def check(self) -> None:
        """Refuse a folder that holds something else; nothing is written.

        Raises:
            RecipeError: A file, or a folder with other files.
        """
        if self.path.is_file():
            raise RecipeError(f"output {self.path}: expected a folder, got a file; change output")
        if self.path.is_dir() and not self.spec.exists() and self._holds_others():
            raise RecipeError(
                f"output {self.path}: expected an empty folder or one of a sweep, got other files; "
                "set output= to another folder"
            )

    def claim(self, resolved: dict[str, Any]) -> None:
        """Make the folder, and write down what the sweep is."""
        write_atomically(self.spec, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        self.runs.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    def _holds_others(self) -> bool:
        """A half-written spec, of a sweep that was killed or begins now, is none."""
        return any(entry.suffix != ".tmp" for entry in self.path.iterdir())

    def name_of(self, name: str) -> str:
        """The name that a run has here: an earlier version may have put it into other words."""
        if not (self.runs / name).exists():
            for found in sorted(self.runs.glob(f"*-{name.rpartition('-')[2]}")):
                return found.name
        return name


class RunFiles:
    """What is kept of one run of a sweep."""

    def __init__(self, folder: SweepFolder, name: str) -> None:
        self.name = name
        self.run = folder.runs / name
        self.record = self.run / "record.json"
        self.lock = folder.work / f"{name}.lock"
        self.log = folder.work / f"{name}.log"
        self.failed = folder.work / f"{name}.failed.json"
        self.progress = folder.work / f"{name}.progress.json"

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Inside the block the run is this process's, unless another has it: then False.

        The operating system frees the lock of a process that ends, however it ends.

        Raises:
            ArtefactError: There can be no lock in this folder.
        """
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError) as error:
            raise ArtefactError(
                f"{self.lock}: expected a file that can be locked, got: {error}; put output= on "
                "another disk"
            ) from error
        try:
            yield True
        finally:
            lock.release()

    def is_taken(self) -> bool:
        """Whether some process is at this run now."""
        if not self.lock.exists():
            return False
        with self.taken() as mine:
            return not mine

    def fail(self, line: str, *, can_be_retried: bool) -> None:
        """Write down why an attempt failed."""
        found = {"error": line, "can_be_retried": can_be_retried, "log": str(self.log)}
        write_atomically(self.failed, json.dumps(found, ensure_ascii=False, indent=1) + "\n")

    def failure(self) -> dict[str, Any] | None:
        """Why the last attempt failed; None where it did not."""
        return _read(self.failed)

    def progress_now(self) -> dict[str, Any]:
        """Phase, what is done of it and the like, as the run last told; empty before that."""
        return _read(self.progress) or {}


class FinishedRuns:
    """Which runs have a record that stands for their recipe; what was read is remembered."""

    def __init__(self) -> None:
        self._records: dict[Path, tuple[int, Record | None]] = {}
        self._hashes: dict[tuple[str, int, int], dict[str, str]] = {}

    def record(self, files: RunFiles, recipe: Recipe) -> Record | None:
        """The record, where it is whole and of this recipe on these data; None otherwise."""
        record = self._read(files.record)
        if record is None:
            return None
        keys = differing(completed(dict(record.recipe)), plain_recipe(recipe))
        if not SHOWING.issuperset(keys) or self._has_changed(recipe, record):
            return None
        return record

    def _read(self, path: Path) -> Record | None:
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            return None
        known = self._records.get(path)
        if known is None or known[0] != stamp:
            try:
                known = (stamp, load_record(path))
            except ArtefactError:  # damaged, or of another version: running it again says which
                known = (stamp, None)
            self._records[path] = known
        return known[1]

    def _has_changed(self, recipe: Recipe, record: Record) -> bool:
        if changed_model_files(recipe.model, record.model_files):
            return True
        for spec in (*data_of(recipe), *measured_files(recipe)):
            if spec.path is None or not spec.path.expanduser().exists():
                continue
            now = self._hash(spec)
            if any(record.files.get(file, found) != found for file, found in now.items()):
                return True
        return False

    def _hash(self, spec: DataSpec) -> dict[str, str]:
        """Of a file, as it is now; of a folder's files each time."""
        assert spec.path is not None, "only files are hashed"
        status = spec.path.expanduser().stat()
        if spec.path.expanduser().is_dir():
            return hash_files([spec])
        key = (str(spec.path), status.st_size, status.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = hash_files([spec])
        return self._hashes[key]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
