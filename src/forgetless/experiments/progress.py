"""How a run tells where it is: a plain class to subclass, and the silent one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Hears of phases, steps, notes and warnings. This one says nothing; override what you show."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Surround one phase of a run: load, data, calibrate, train, evaluate, export, report."""
        yield

    def advance(self, done: int, total: int, what: str = "") -> None:
        """Tell how many rows or steps of the current phase, or of its part `what`, are done."""

    def note(self, text: str) -> None:
        """Pass on a line that a user wants to know."""

    def warn(self, text: str) -> None:
        """Pass on a line that a user should act on, or keep in mind; it is in the record too."""
