"""Sweeps that a test may kill: forked from a process that has done the slow imports and no more.

Reads one JSON line an attempt from standard input:

- `sweep`: what its YAML holds; `cache`: the cache folder; `counts`: a file that gets a line for
  each piece of work that runs share
- `times`: how many such sweeps to run side by side
- `die_in_save`: whether a run kills its own process group in the middle of writing a checkpoint
- `crash`: a file; while it is there, runs of `lora-null` kill their own process

Writes `pid N`, then `begun NAME` and `done NAME` as runs advance, then `end STATUS`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Trainer

import forgetless.experiments.run  # noqa: F401 - slow, so before anything is forked
from forgetless.adapters import start
from forgetless.calibration import calibrate
from forgetless.evaluation.base_states import BaseStates
from forgetless.experiments.sweep import SweepProgress, SweepSpec, local, server, sweep, work


def say(text: str) -> None:
    """One write, so that a kill never leaves half a line."""
    os.write(1, f"{text}\n".encode())


class Loud(SweepProgress):
    def __init__(self) -> None:
        self.told: dict[str, str] = {}

    def look(self, status):
        for one in status.runs:
            if one.state in ("running", "done") and self.told.get(one.run.name) != one.state:
                self.told[one.run.name] = one.state
                say(f"{'begun' if one.state == 'running' else 'done'} {one.run.name}")

    def note(self, text):
        say(f"note {text}")


class ForkedServer:
    """The server of runs, forked: it need not import anything anew. In place of a Popen."""

    def __init__(self, log: Path) -> None:
        del log
        jobs, orders = os.pipe()
        told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.dup2(jobs, 0)
            os.dup2(tell, 1)
            os.closerange(3, 64)
            try:
                server.main()
            finally:
                os._exit(0)
        os.close(jobs)
        os.close(tell)
        self.stdin, self.stdout = os.fdopen(orders, "wb"), os.fdopen(told, "rb")

    def wait(self, seconds: float) -> None:
        del seconds
        os.waitpid(self.pid, 0)


def die_while_saving() -> None:
    """After adapter and optimiser are written, and half of the generators' state."""
    save = Trainer._save_rng_state

    def save_half(self: Trainer, output_dir: str) -> None:
        save(self, output_dir)
        path = Path(output_dir) / "rng_state.pth"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        os.killpg(0, signal.SIGKILL)

    Trainer._save_rng_state = save_half


def crash_while(flag: Path) -> None:
    run = work._run

    def crashing(job, heard):
        if flag.exists() and job.name.startswith("lora-null"):
            with flag.open("a") as attempts:
                attempts.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        run(job, heard)

    work._run = crashing


def count_into(path: Path) -> None:
    def count(what):
        with path.open("a") as file:
            file.write(f"{what}\n")

    def counted(what, function):
        def called(*args, **keywords):
            count(what)
            return function(*args, **keywords)

        return called

    solve = start._solved

    def solved(*args):
        count("start")
        yield from solve(*args)

    calibrate.collect_moments = counted("moments", calibrate.collect_moments)
    start._solved = solved
    BaseStates._write = counted("base", BaseStates._write)


def attempt(order: dict) -> int:
    torch.set_num_threads(1)
    os.environ["FORGETLESS_CACHE"] = order["cache"]
    count_into(Path(order["counts"]))
    local.start_server = ForkedServer
    if order.get("die_in_save"):
        die_while_saving()
    if order.get("crash"):
        crash_while(Path(order["crash"]))
    try:
        sweep(
            SweepSpec.model_validate(order["sweep"]), progress=Loud(), resume="forgetless sweep x"
        )
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    assert subprocess.Popen is not ForkedServer
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            say(f"pid {os.getpid()}")
            children = []
            for _ in range(order.get("times", 1) - 1):
                child = os.fork()
                if child == 0:
                    os._exit(attempt(order))
                children.append(child)
            status = attempt(order)
            status += sum(os.waitpid(child, 0)[1] for child in children)
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        say(f"end {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
