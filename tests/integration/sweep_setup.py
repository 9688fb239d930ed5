"""A sweep of 12 quick runs, and the process that runs it for a test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run_setup import recipe_of
from safetensors.torch import load_file

from forgetless.experiments.record import load_record

HERE = Path(__file__).parent
GRID = {
    "method": ["lora", "lora-null", {"name": "sc-lora", "trains": "a"}],
    "method.rank": [4],
    "training.learning_rate": [1e-3, 5e-3],
    "seed": [0, 1],
}


def base_of(model: Path, data: Path) -> dict[str, Any]:
    """Three steps, each of them saved; likelihoods only."""
    tree = recipe_of(model, data, Path("none")).resolved()
    tree["training"] |= {"max_steps": 3, "save_steps": 1, "logging_steps": 1, "validation_rows": 0}
    for side in ("gain", "retention"):
        for item in tree["evaluation"][side]:
            item["metrics"] = ["nll", "kl"]
    tree["evaluation"] |= {"scales": [], "samples": 0}
    del tree["output"]
    return tree


class Sweeps:
    """Talks to `killable_sweep.py`."""

    def __init__(self, model: Path, data: Path, folder: Path) -> None:
        self.base, self.folder = base_of(model, data), folder
        paths = [str(HERE.parents[1] / "src"), str(HERE)]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "killable_sweep.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.notes: list[str] = []
        self.group = 0
        self.seconds = 0.0  # that the last attempt took

    def order(self, name: str, **keys: Any) -> dict[str, Any]:
        spec = {"base": self.base, "output": str(self.folder / name), "threads": 1}
        return {
            "sweep": {**spec, "grid": GRID, "processes": 2, **keys},
            "cache": str(self.folder / f"{name}.cache"),
            "counts": str(self.folder / f"{name}.counts"),
        }

    def run(
        self,
        name: str,
        *,
        kill_after: float | None = None,
        kill_when_one_ends: bool = False,
        sent: int = signal.SIGKILL,
        only_the_sweep: bool = False,
        order: dict[str, Any] | None = None,
        **keys: Any,
    ) -> int:
        """Exit status of one attempt.

        It is killed some seconds after the first run has begun, and with `kill_when_one_ends` as
        soon as one has ended, if that is earlier.
        """
        self.notes, self.group = [], 0
        ended_before = {f"done {name}" for name in finished(self.folder / name)}
        kill = partial(self._kill, sent, only_the_sweep)
        timer = None if kill_after is None else threading.Timer(kill_after, kill)
        begun = time.monotonic()
        self._process.stdin.write(json.dumps(self.order(name, **keys) | (order or {})) + "\n")
        self._process.stdin.flush()
        for line in (line.strip() for line in self._process.stdout):
            word, _, value = line.partition(" ")
            if word == "pid":
                self.group = int(value)
            elif word == "note":
                self.notes.append(value)
            elif word == "end":
                self.seconds = time.monotonic() - begun
                if timer is not None:
                    timer.cancel()
                return int(value)
            elif word == "begun" and timer is not None and timer.ident is None:
                timer.start()
            elif word == "done" and kill_when_one_ends and line not in ended_before:
                kill()
        raise AssertionError("the process that starts sweeps has ended")

    def _kill(self, sent: int, only_the_sweep: bool) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was done before
            (os.kill if only_the_sweep else os.killpg)(self.group, sent)

    def counts(self, name: str) -> Counter[str]:
        return Counter((self.folder / f"{name}.counts").read_text().split())

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(30) == 0


def finished(output: Path) -> list[str]:
    """Names of the runs that have a record."""
    return [path.parent.name for path in (output / "runs").glob("*/record.json")]


def records(output: Path) -> dict[str, dict[str, Any]]:
    """By run, without what two equal runs may differ in: times, folder, interruptions."""
    found = {}
    for folder in sorted((output / "runs").iterdir()):
        record = load_record(folder / "record.json").model_dump()
        for name in ("created", "phases", "processor", "memory"):
            del record[name]
        del record["recipe"]["output"], record["training"]["resumed_from"]
        del record["evaluation"]["seconds"]
        found[folder.name] = record
    return found


def assert_same_runs(first: Path, second: Path) -> None:
    """Records and adapters, bit for bit."""
    expected, found = records(first), records(second)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
        weights = [
            load_file(folder / "runs" / name / "adapter/adapter_model.safetensors")
            for folder in (first, second)
        ]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def lines_of(folder: Path, text: str) -> Iterator[int]:
    """How many lines of each run's log end with a text."""
    for log in sorted((folder / "work").glob("*-*.log")):
        yield sum(line.endswith(text) for line in log.read_text().splitlines())
