"""SIGKILL at any time, also in the middle of a save: the same command goes on and ends the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_setup import write_data
from safetensors.torch import load_file

from forgetless.experiments.record import load_record
from forgetless.training.checkpoint import read_marker

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
KILLED = -signal.SIGKILL


class Runs:
    """Talks to `killable_run.py`."""

    def __init__(self, model: Path, data: Path) -> None:
        self._order = {"model": str(model), "data": str(data)}
        paths = [str(HERE.parents[1] / "src"), str(HERE)]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "killable_run.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def run(
        self, output: Path, *, kill_at: str = "", delay: float = 0.0, die_in_save: int = 0
    ) -> int:
        """Exit status of one attempt, killed `delay` seconds after it has said `kill_at`."""
        order = {**self._order, "output": str(output), "cache": f"{output}.cache"}
        self._write(json.dumps({**order, "die_in_save": str(die_in_save or "")}))
        group = 0
        for line in self._lines():
            word, value = line.split()
            if word == "pid":
                group = int(value)
            elif word == "end":
                return int(value)
            elif line == kill_at:
                kill_at = ""
                time.sleep(delay)
                os.killpg(group, signal.SIGKILL)
        raise AssertionError("the process that starts runs has ended")

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(30) == 0

    def _write(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _lines(self) -> Iterator[str]:
        yield from (line.strip() for line in self._process.stdout)


@pytest.fixture
def runs(tmp_path, tiny_model_path) -> Iterator[Runs]:
    write_data(tmp_path / "data")
    started = Runs(tiny_model_path, tmp_path / "data")
    yield started
    started.close()


def without_timing(output: Path) -> dict[str, object]:
    """A record without what two equal runs may differ in: times, folder, interruptions."""
    record = load_record(output / "record.json").model_dump()
    for name in ("created", "phases", "processor", "memory"):
        del record[name]
    del record["recipe"]["output"]
    del record["training"]["resumed_from"]
    for report in (record["evaluation"], *record["scaled"]):
        del report["seconds"]
    return record


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(runs, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert runs.run(whole) == 0
    draw = random.Random(20260101)
    step = draw.randint(4, 8)

    assert runs.run(broken, kill_at="calibrate 0", delay=draw.uniform(0, 0.05)) == KILLED
    # Somewhere in a step, or in the save that follows it.
    assert runs.run(broken, kill_at=f"train {step}", delay=draw.uniform(0, 0.05)) == KILLED
    assert runs.run(broken, die_in_save=12) == KILLED
    torn = broken / "checkpoints" / "checkpoint-12"
    assert (torn / "optimizer.pt").exists()
    assert read_marker(torn) is None
    assert read_marker(torn.with_name("checkpoint-9")).step == 9
    for at in (draw.randint(13, 20), draw.randint(21, 29)):
        assert runs.run(broken, kill_at=f"train {at}", delay=draw.uniform(0, 0.05)) == KILLED
    assert runs.run(broken, kill_at="evaluate 0", delay=draw.uniform(0, 0.02)) == KILLED
    assert not (broken / "record.json").exists()
    assert runs.run(broken) == 0

    assert without_timing(broken) == without_timing(whole)
    resumed = load_record(broken / "record.json").training.resumed_from
    assert 9 in resumed
    assert 30 not in resumed  # killed after the last step: no step was repeated
    for file in (
        "adapter/adapter_model.safetensors",
        "checkpoints/checkpoint-30/adapter_model.safetensors",
    ):
        expected, found = load_file(whole / file), load_file(broken / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
