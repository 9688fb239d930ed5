"""How a run tells where it is: a plain class to subclass, and the silent one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from forgetless.errors import ForgetlessWarning


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

    def command(self, line: str) -> None:
        """Pass on a command for a shell, to be shown so that it can be pasted as it stands."""

    def warn(self, text: str) -> None:
        """Pass on a line that a user should act on, or keep in mind; it is in the record too."""


@contextmanager
def warnings_heard(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, hand our own warnings to `tell`, each text once; others go their way."""
    told: set[str] = set()
    with warnings.catch_warnings():
        elsewhere = warnings.showwarning
        warnings.simplefilter("always", ForgetlessWarning)

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, ForgetlessWarning):
                elsewhere(message, category, filename, lineno, file, line)
            elif str(message) not in told:
                told.add(str(message))
                tell(str(message))

        warnings.showwarning = show
        yield
