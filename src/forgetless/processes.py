"""The processes of one run: how many there are, which one this is, and how they agree.

torchrun and `accelerate launch` start a program several times; torch.distributed connects them
(gloo between CPUs, NCCL between GPUs). Every method of `Processes` is collective: all processes
call it, in the same order. With one process each is what a program without processes would do.
"""

from __future__ import annotations

import atexit
import heapq
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, distributed

from forgetless.errors import ElsewhereError, ForgetlessError
from forgetless.launcher import VARIABLES, num_launched

# How long a process waits for the others, which may download, sample, or read a large model. One
# that has ended is noticed at once.
PATIENCE = timedelta(hours=6)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Processes:
    """Where this process stands among those of a run.

    Attributes:
        rank: From 0, the main one, which writes files.
        count: How many there are.
        on_this_machine: How many of them share this machine's memory.
    """

    rank: int = 0
    count: int = 1
    on_this_machine: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and talks to the user."""
        return self.rank == 0

    def shares(self, costs: Mapping[str, float]) -> list[list[str]]:
        """Work divided by cost, the same in every process: what each does, in the order given.

        The costliest first, each to whoever has least so far.
        """
        loads = [(0.0, rank) for rank in range(self.count)]
        owner: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            load, rank = heapq.heappop(loads)
            owner[name] = rank
            heapq.heappush(loads, (load + costs[name], rank))
        return [[name for name in costs if owner[name] == rank] for rank in range(self.count)]

    def each(self, value: Any) -> list[Any]:
        """What every process has for `value`, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def of_main(self, value: Any) -> Any:
        """The main process's value."""
        return self.each(value if self.is_main else None)[0]

    def by_main(self, make: Callable[[], _T]) -> _T:
        """What the main process alone makes, told to the others.

        Raises:
            ForgetlessError: In all processes, where it fails.
        """
        made: _T | None = None
        with self.together():
            if self.is_main:
                made = make()
        told: _T = self.of_main(made)
        return told

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails in all processes, once all are through it, where it fails in one.

        Nothing inside may wait for another process.

        Raises:
            ForgetlessError: That of the block; `ElsewhereError` where only another process had one.
        """
        own: ForgetlessError | OSError | None = None
        try:
            yield
        except (ForgetlessError, OSError) as error:
            if self.count == 1:
                raise
            own = error
        failed = [rank for rank, bad in enumerate(self.each(own is not None)) if bad]
        if own is not None:
            raise own
        if failed:
            raise ElsewhereError(f"process {failed[0]} of {self.count} has failed; it says why")

    def add_up_(self, tensor: Tensor) -> None:
        """Put the sum over all processes in place of each one's own."""
        if self.count > 1:
            with _where_it_travels(tensor) as moved:
                distributed.all_reduce(moved)

    def send_(self, tensor: Tensor, source: int) -> None:
        """Put what one process has in place of what the others have."""
        if self.count > 1:
            with _where_it_travels(tensor) as moved:
                distributed.broadcast(moved, source)

    def part(self) -> None:
        """The end of what is done together: from here on each process is on its own."""
        if self.count == 1:
            return
        _Parted.since_launch = True
        distributed.barrier()
        distributed.destroy_process_group()
        for state in (AcceleratorState, GradientState):
            state._reset_state()
        PartialState._reset_state()
        for name in VARIABLES:
            os.environ.pop(name, None)


class _Parted:
    """Whether this process has been one of several, and is no longer."""

    since_launch = False


ALONE = Processes()


def connected() -> Processes:
    """Those that torch.distributed has connected; `ALONE` where it has not."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    here = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size()))
    return Processes(distributed.get_rank(), distributed.get_world_size(), here)


def connect(device: str = "auto") -> Processes:
    """Those of the launcher that started this process, torchrun or `accelerate launch`, if any.

    From then on SIGTERM, with which a launcher ends the others where one has died, lets a process
    take back the file that it is in the middle of, unless the program handles SIGTERM itself. One
    that waits for another process ends once that has answered, or has ended too.

    Args:
        device: As for `load_model`.

    Raises:
        ForgetlessError: The processes have parted: each would do all of it, into the same files.
    """
    if _Parted.since_launch:
        raise ForgetlessError(
            "processes: expected one run of a program that a launcher has started several times, "
            "got another; the processes have parted after the first: start it as a program of its "
            "own"
        )
    if num_launched() > 1:
        _leave_in_order_on_sigterm()
        if not distributed.is_initialized():
            on_cpu = device == "cpu" or not torch.cuda.is_available()
            PartialState(cpu=on_cpu, timeout=PATIENCE)
    return connected()


def is_first_to_say(text: str) -> bool:
    """Whether no other process of this run has said it yet, as far as that can be told."""
    if not distributed.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"  # once on each machine
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(f"forgetless/said/{text}", 1) == 1)
    except (RuntimeError, ValueError):  # it was the main process's, which has ended
        return True


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says no more than that another process has ended."""
    text = str(error)
    return isinstance(error, distributed.DistError) or any(
        sign in text for sign in ("Connection closed by peer", "Connection reset", "gloo")
    )


def _leave_in_order_on_sigterm() -> None:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _leave)
        # Then there is nothing to take back, and an exit within an exit is a traceback.
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_DFL)


def _leave(*_: object) -> NoReturn:
    """End as an exit does, so that what is half written is taken back."""
    text = (
        "forgetless: stopped by the launcher (SIGTERM), as happens where another process has "
        "ended. What is finished is kept: the same command resumes"
    )
    sys.exit(text if is_first_to_say(text) else 1)


@contextmanager
def _where_it_travels(tensor: Tensor) -> Iterator[Tensor]:
    """A contiguous copy where NCCL alone connects the processes and the tensor is on the CPU."""
    away = tensor.device.type == "cpu" and distributed.get_backend() == "nccl"
    if not away and tensor.is_contiguous():
        yield tensor
        return
    moved = tensor.to("cuda" if away else tensor.device, copy=True).contiguous()
    yield moved
    tensor.copy_(moved)
