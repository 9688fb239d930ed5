"""Progress on a terminal: a bar for the phase that runs, a line with its time when it is done."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

from forgetless.experiments.progress import Progress

WIDEST = 80  # columns of a note or warning: longer lines are hard to read
SECONDS_BETWEEN_LINES = 30.0  # of progress in a log, within a phase
SECONDS_BETWEEN_VERBOSE_LINES = 5.0

Level = Literal["quiet", "normal", "verbose"]


class TerminalProgress(Progress):
    """Bars on a terminal, plain lines in a log; everything goes to standard error.

    Standard output is left to results, so that it can be piped. A log has no bars: each phase is
    one line with its time, written at its end; within a long one, a line now and then. `quiet` lets
    only warnings through; `verbose` writes a log on a terminal too, with the time of day, and more
    often.
    """

    def __init__(self, console: Console | None = None, level: Level = "normal") -> None:
        """Write to `console`, standard error where none is given."""
        self.console = console or Console(stderr=True, highlight=False)
        self.level = level
        self._has_bars = self.console.is_terminal and level == "normal"
        self._seconds = (
            SECONDS_BETWEEN_VERBOSE_LINES if level == "verbose" else SECONDS_BETWEEN_LINES
        )
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._phase, self._last_line = "", time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a bar while the phase runs, on a terminal, and its seconds after."""
        start = time.monotonic()
        self._phase, self._last_line = name, start
        if self.level == "verbose":
            self._write(f"{name} begins")
        with self._bar(name) if self._has_bars else nullcontext():
            yield
        if self.level != "quiet":
            self.console.print(f"  {name:<44} {time.monotonic() - start:7.1f} s", markup=False)

    def advance(self, done: int, total: int, what: str = "") -> None:
        """Move the bar; in a log, write a line where the last one is long ago."""
        now = time.monotonic()
        is_log = self.level != "quiet" and not self._has_bars
        if is_log and now - self._last_line >= self._seconds:
            self._last_line = now
            part = f", {what}" if what else ""
            self._write(f"{self._phase}{part}: {done} of {total}")
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, description=what or None)

    def note(self, text: str) -> None:
        """A line, wrapped."""
        if self.level != "quiet":
            self._write(text)

    def command(self, line: str) -> None:
        """The command alone on its line, however long: a break or an indent would be pasted too."""
        self.console.print(line, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that stands out, also without colour; wrapped."""
        self._write(f"warning: {text}", style="yellow")

    @contextmanager
    def _bar(self, name: str) -> Iterator[None]:
        """A bar that `advance` moves; it leaves the terminal with the phase."""
        bars = Bars(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        outer = (self._bars, self._task)
        if outer[0] is not None:
            outer[0].stop()
        with bars:
            self._bars, self._task = bars, bars.add_task(name, total=None)
            try:
                yield
            finally:
                self._bars, self._task = outer

    def _write(self, text: str, style: str | None = None) -> None:
        """Print with a hanging indent; a path or name that is too long for a line stays whole."""
        wrapped = textwrap.fill(
            f"{datetime.now():%H:%M:%S} {text}" if self.level == "verbose" else text,
            width=min(self.console.width, WIDEST),
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        # Rich would wrap a second time, without the indent.
        self.console.print(wrapped, markup=False, style=style, soft_wrap=True)
