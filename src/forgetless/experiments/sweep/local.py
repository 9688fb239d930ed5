"""Local processes: as many at a time as asked for, on each device."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from forgetless.errors import ForgetlessError
from forgetless.experiments.sweep.executors import Ended
from forgetless.experiments.sweep.server import TAKEN
from forgetless.experiments.sweep.work import Job

# Ctrl-C in a terminal reaches every process: what it means is the sweep's to say, from the first.
_COMMAND = """\
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from forgetless.experiments.sweep.server import main
main()
"""
_GPUS = "CUDA_VISIBLE_DEVICES"


class LocalProcesses:
    """Processes on this machine, forked by a server that has done the slow imports.

    All stay in the process group of the sweep, so that what kills the group kills them.
    """

    def __init__(
        self, log: Path, processes: int, *, gpus: Sequence[str] = (), threads: int | None
    ) -> None:
        """Take what there is.

        Args:
            log: File for what the server's libraries say while they load.
            processes: At a time, on each GPU where there are several.
            gpus: To share the runs out to, as CUDA_VISIBLE_DEVICES names them. Fewer than two: runs
                see what this process sees.
            threads: Cores of a process; all, shared out, where not given.
        """
        self._log = log
        self._gpus = tuple(gpus) if len(gpus) > 1 else ()
        self.slots = processes * max(len(self._gpus), 1)
        self._threads = threads or max((os.cpu_count() or 1) // self.slots, 1)
        self._on: dict[str, str] = {}  # run → its GPU
        self._server: subprocess.Popen[bytes] | None = None
        self._received = b""

    def start(self, job: Job) -> None:
        """Begin a run, on the GPU that has least to do."""
        busy = Counter(self._on.values())
        self._on[job.name] = min(self._gpus, key=lambda gpu: busy[gpu], default="")
        if self._gpus:
            job = replace(job, environment={**job.environment, _GPUS: self._on[job.name]})
        server = self._serving()
        assert server.stdin is not None
        line = replace(job, threads=job.threads or self._threads).as_json()
        try:
            server.stdin.write(f"{line}\n".encode())
            server.stdin.flush()
        except BrokenPipeError:
            pass  # the server has died; `ended` tells of all that it was at

    def ended(self, seconds: float) -> list[Ended]:
        """Runs that have ended."""
        if self._server is None or self._server.stdout is None or not self._on:
            return []
        ready, _, _ = select.select([self._server.stdout], [], [], seconds)
        if not ready:
            return []
        received = os.read(self._server.stdout.fileno(), 1 << 16)
        if not received:
            return self._all_lost()
        *lines, self._received = (self._received + received).split(b"\n")
        return [self._of(*line.decode().rsplit(" ", 1)) for line in lines]

    def stop(self) -> None:
        """Kill all runs; what they have saved stays."""
        server, self._server = self._server, None
        self._on.clear()
        if server is None:
            return
        for pipe in (server.stdin, server.stdout):
            if pipe is not None:
                pipe.close()  # the server kills its runs, and ends
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()

    def _serving(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            if not hasattr(os, "fork"):
                raise ForgetlessError(
                    f"sweep: expected a system that can fork processes, got {sys.platform}; use "
                    "executor: ray, or run the recipes one by one"
                )
            self._server = start_server(self._log)
        return self._server

    def _of(self, name: str, status: str) -> Ended:
        self._on.pop(name, None)
        code = int(status)
        known = {0: "done", 1: "failed", TAKEN: "taken"}
        if code in known:
            return Ended(name, known[code])
        if code < 0:
            return Ended(name, f"its process was ended by {signal.Signals(-code).name}{_why(code)}")
        return Ended(name, f"its process ended with status {code}")

    def _all_lost(self) -> list[Ended]:
        how = f"the process that starts runs has ended (see {self._log})"
        lost = [Ended(name, how) for name in self._on]
        self._on.clear()
        self.stop()
        return lost


def start_server(log: Path) -> subprocess.Popen[bytes]:
    """The process that starts runs: it reads jobs, and tells of those that have ended."""
    # Idle threads sleep: spinning ones of several processes starve each other.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    with log.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )


def _why(code: int) -> str:
    return ", as Linux does where memory is short" if code == -signal.SIGKILL else ""


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get(_GPUS)
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index in range(torch.cuda.device_count())]
