"""What runs the runs of a sweep: the protocol that local processes and a Ray cluster keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from forgetless.experiments.sweep.work import Job


@dataclass(frozen=True)
class Ended:
    """A run whose process has ended.

    Attributes:
        name: Of the run.
        how: `done`, `failed` (the reason is in its files), `taken` (another sweep is at it), or
            what befell the process, in words.
        is_final: Whether the executor has tried again already, as often as it may.
    """

    name: str
    how: str
    is_final: bool = False


class Executor(Protocol):
    """Starts runs and tells of those that have ended. What a run did is on disk, not here."""

    @property
    def slots(self) -> int:
        """How many runs it takes at a time."""

    def start(self, job: Job) -> None:
        """Begin a run; returns at once."""

    def ended(self, seconds: float) -> list[Ended]:
        """Runs that have ended since, after waiting for one at most that long."""

    def stop(self) -> None:
        """End all runs that are going on; what they have saved stays."""
