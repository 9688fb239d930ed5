"""Runs that a test may kill: forked from a process that has done the slow imports and no more.

Reads one JSON line a run from standard input: `model`, `data`, `output`, `cache`, and
`die_in_save`, the step at which the run kills its own process group in the middle of writing a
checkpoint. Writes `pid N`, then `PHASE DONE` as the run advances, then `end STATUS`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from run_setup import recipe_of
from transformers import Trainer

from forgetless.experiments.progress import Progress
from forgetless.experiments.run import run


def say(text: str) -> None:
    """One write, so that a kill never leaves half a line."""
    os.write(1, f"{text}\n".encode())


class Loud(Progress):
    def __init__(self) -> None:
        self.name = ""

    @contextmanager
    def phase(self, name):
        self.name = name
        say(f"{name} 0")
        yield

    def advance(self, done, total, what=""):
        say(f"{self.name} {done}")


def die_while_saving(step: int) -> None:
    """After adapter and optimiser of that step are written, and half of the generators' state."""
    save = Trainer._save_rng_state

    def save_half(self: Trainer, output_dir: str) -> None:
        save(self, output_dir)
        if self.state.global_step >= step:
            path = Path(output_dir) / "rng_state.pth"
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.killpg(0, signal.SIGKILL)

    Trainer._save_rng_state = save_half


def attempt(order: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ["FORGETLESS_CACHE"] = order["cache"]
    if order["die_in_save"]:
        die_while_saving(int(order["die_in_save"]))
    recipe = recipe_of(Path(order["model"]), Path(order["data"]), Path(order["output"]))
    run(recipe, progress=Loud())


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            say(f"pid {os.getpid()}")
            attempt(order)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        say(f"end {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
