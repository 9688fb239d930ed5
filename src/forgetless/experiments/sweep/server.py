"""Starts runs for a sweep, each in a process of its own.

Reads a job a line from standard input, writes `NAME STATUS` a line for each process that has ended
to standard output. It has done the slow imports, and nothing else, before it forks: a run begins at
once, and what a run leaves in memory or on a GPU goes with its process. Where standard input ends,
because the sweep has ended in whatever way, all runs are killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys

from forgetless.experiments.sweep.work import Job, work

TAKEN = 3  # status of a run that another sweep is at
_SECONDS_BETWEEN_LOOKS = 0.05


def main() -> None:
    """Serve until standard input ends."""
    import forgetless.experiments.run  # noqa: F401 - the slow imports

    running: dict[int, str] = {}
    pending = b""
    try:
        while True:
            ready, _, _ = select.select([0], [], [], _SECONDS_BETWEEN_LOOKS)
            if ready:
                received = os.read(0, 1 << 16)
                if not received:
                    return
                *lines, pending = (pending + received).split(b"\n")
                for line in lines:
                    job = Job.from_json(line.decode())
                    running[_start(job)] = job.name
            _tell_ended(running)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def _start(job: Job) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):  # the sweep's: neither to be read nor to be written here
            os.dup2(quiet, descriptor)
        # What libraries written in C say, and a fatal error, belong into the log too.
        job.files.log.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(job.files.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 2)
        status = {"done": 0, "failed": 1, "taken": TAKEN}[work(job)]
    except Exception as error:  # before the run has a log of its own
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        with contextlib.suppress(OSError):
            job.files.fail(reason, can_be_retried=True)
    finally:
        os._exit(status)


def _tell_ended(running: dict[int, str]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if pid in running:
            os.write(1, f"{running.pop(pid)} {os.waitstatus_to_exitcode(status)}\n".encode())
