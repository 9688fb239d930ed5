"""One run of a sweep, in a process of its own: taken, done, and its failure written down."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from forgetless.atomic import write_atomically
from forgetless.data.validation import validated
from forgetless.errors import ForgetlessError
from forgetless.experiments.progress import Progress
from forgetless.experiments.sweep.folder import RunFiles, SweepFolder
from forgetless.recipe import Recipe

Outcome = Literal["done", "failed", "taken"]
_SECONDS_BETWEEN_NOTES = 1.0  # of progress


@dataclass(frozen=True)
class Job:
    """What a process must know, as plain values.

    Attributes:
        name: Of the run.
        recipe: Resolved.
        sweep: Folder of the sweep, absolute.
        directory: Working directory, which paths in the recipe are relative to.
        environment: Variables to set, such as the GPU to use.
        threads: Cores to use; as torch has it where not given.
        allow_task_code: Whether folders of lm-eval tasks may run Python.
    """

    name: str
    recipe: Mapping[str, Any]
    sweep: str
    directory: str
    environment: Mapping[str, str]
    threads: int | None
    allow_task_code: bool

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The job of a line that `as_json` made."""
        return cls(**json.loads(line))

    @property
    def files(self) -> RunFiles:
        """Where the run lies."""
        return RunFiles(SweepFolder(Path(self.sweep)), self.name)


def work(job: Job) -> Outcome:
    """Do one run in this process, which is changed by it: directory, environment, threads.

    Nothing is raised but what ends a process: a failure is in the run's log, with one line of it in
    its `failed.json`.
    """
    files = job.files
    with files.taken() as mine:
        if not mine:
            return "taken"
        os.environ.update(job.environment)
        os.chdir(job.directory)
        files.log.parent.mkdir(parents=True, exist_ok=True)
        with (
            files.log.open("a", encoding="utf-8", errors="replace", buffering=1) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            files.failed.unlink(missing_ok=True)  # of an earlier attempt
            heard = _Notes(files, log)
            try:
                _run(job, heard)
            except ForgetlessError as error:
                heard.write(f"failed: {error}")
                files.fail(str(error), can_be_retried=False)
                return "failed"
            except Exception as error:
                traceback.print_exc(file=log)
                said = (str(error).splitlines() or [""])[0]
                files.fail(f"{type(error).__name__}: {said}", can_be_retried=True)
                return "failed"
            finally:
                files.progress.unlink(missing_ok=True)
    return "done"


def _run(job: Job, heard: _Notes) -> None:
    import torch

    from forgetless.experiments.run import run

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    heard.write(f"begins in process {os.getpid()} on {socket.gethostname()}")
    recipe = validated(Recipe, dict(job.recipe))
    run(recipe, progress=heard, allow_task_code=job.allow_task_code)
    heard.write("done")


class _Notes(Progress):
    """Progress into the log, and the newest of it into a small file that the sweep looks at."""

    def __init__(self, files: RunFiles, log: TextIO) -> None:
        self._files, self._log = files, log
        self._told = 0.0
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._parent = os.getppid()
        self._phase = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        self._phase = name
        self.write(f"{name} begins")
        self._tell(0, 0, "", at_once=True)
        yield
        self.write(f"{name} took {time.monotonic() - begun:.1f} s")

    def advance(self, done: int, total: int, what: str = "") -> None:
        if os.getppid() != self._parent:  # what started this process has died: so would it have
            self.write("stops: the sweep has ended")
            sys.exit(1)
        self._tell(done, total, what)

    def note(self, text: str) -> None:
        self.write(text)

    def command(self, line: str) -> None:
        self.write(line)

    def warn(self, text: str) -> None:
        self.write(f"warning: {text}")

    def write(self, text: str) -> None:
        """A line with the time of day."""
        self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def _tell(self, done: int, total: int, what: str, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._told < _SECONDS_BETWEEN_NOTES:
            return
        self._told = now
        found = {
            "phase": self._phase,
            "what": what,
            "done": done,
            "total": total,
            "since": self._since,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with contextlib.suppress(OSError):  # a full disk must not end a run for the sake of a table
            write_atomically(self._files.progress, json.dumps(found) + "\n")
