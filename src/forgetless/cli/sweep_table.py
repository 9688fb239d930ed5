"""The table of a sweep: on a terminal it moves, in a log each run that ends is a line."""

from __future__ import annotations

import textwrap
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from forgetless.escaping import one_line
from forgetless.experiments.sweep.drive import RunStatus, SweepProgress, SweepStatus
from forgetless.experiments.sweep.estimate import seconds_left

if TYPE_CHECKING:
    from forgetless.experiments.sweep.folder import State

WIDEST = 80
MOST_ROWS = 12
Level = Literal["quiet", "normal", "verbose"]
_STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "waiting": "dim",
}


class SweepTable(SweepProgress):
    """Shows a sweep on standard error; used as a context manager."""

    def __init__(self, console: Console | None = None, level: Level = "normal") -> None:
        """Write to `console`, standard error where none is given."""
        self._console = console or Console(stderr=True, highlight=False)
        self._level = level
        self._live: Live | None = None
        if self._console.is_terminal and level == "normal":
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._told: dict[str, State] = {}

    def __enter__(self) -> SweepTable:
        """Begin to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def look(self, status: SweepStatus) -> None:
        """Draw the table, or tell of runs that have begun or ended since."""
        if self._live is not None:
            self._live.update(Group(Text(headline(status)), table(status, MOST_ROWS)))
            return
        if self._level == "quiet":
            return
        if not self._told:
            self._write(headline(status))
        for one in status.runs:
            before = self._told.get(one.run.name)
            if one.state == before:
                continue
            self._told[one.run.name] = one.state
            if one.state == "done" and not one.was_done:
                took = f" ({duration(one.seconds)})" if one.seconds else ""
                self._write(f"done: {one_line(one.run.label)}{took}; {headline(status)}")
            elif one.state == "running" and self._level == "verbose":
                self._write(f"begins: {one_line(one.run.label)}")

    def note(self, text: str) -> None:
        """A line above the table."""
        if self._level != "quiet" or text.startswith("failed"):
            self._write(text)

    def command(self, line: str) -> None:
        """The command alone on its line, however long."""
        self._console.print(line, markup=False, soft_wrap=True)

    def _write(self, text: str) -> None:
        wrapped = textwrap.fill(
            f"{datetime.now():%H:%M:%S} {text}",
            width=min(self._console.width, WIDEST),
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        self._console.print(wrapped, markup=False, soft_wrap=True)


def headline(status: SweepStatus) -> str:
    """`5 of 12 done, 2 running, 1 failed, 12 min left`."""
    count = status.count()
    parts = [f"{count['done']} of {len(status.runs)} done"]
    parts += [f"{count[state]} {state}" for state in ("running", "failed") if count[state]]
    left = seconds_left(status)
    if count["running"] or count["waiting"]:
        parts.append("time left not known yet" if left is None else f"{duration(left)} left")
    return ", ".join(parts)


def table(status: SweepStatus, most: int | None = None) -> Table:
    """Runs with their states; where there are more than `most`, those that matter now."""
    shown = Table(box=None, width=WIDEST, pad_edge=False, show_edge=False)
    shown.add_column("run", ratio=1, no_wrap=True, overflow="ellipsis")
    shown.add_column("state", width=7)
    shown.add_column("", width=26, no_wrap=True, overflow="ellipsis")
    chosen = _chosen(status.runs, most)
    for one in chosen:
        shown.add_row(
            Text(one_line(one.run.label)),
            Text(one.state, style=_STYLES[one.state]),
            Text(_detail(one)),
        )
    if len(chosen) < len(status.runs):
        shown.add_row(Text(f"… and {len(status.runs) - len(chosen)} more", style="dim"), "", "")
    return shown


def duration(seconds: float) -> str:
    """`12 s`, `34 min`, `5.6 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _chosen(runs: list[RunStatus], most: int | None) -> list[RunStatus]:
    """Running and failed ones, then what is next, then what is done last; in the sweep's order."""
    if most is None or len(runs) <= most:
        return runs
    order: tuple[State, ...] = ("running", "failed", "waiting", "done")
    ranked = sorted(range(len(runs)), key=lambda index: order.index(runs[index].state))
    return [runs[index] for index in sorted(ranked[:most])]


def _detail(one: RunStatus) -> str:
    if one.state == "done":
        return duration(one.seconds)
    if one.state == "failed":
        return one_line(one.error)
    if one.state != "running":
        return ""
    where = " (another sweep)" if one.is_elsewhere else ""
    phase, total = one.progress.get("phase"), one.progress.get("total")
    if not phase:
        return f"begins{where}"
    part = f" {one.progress.get('done')}/{total}" if total else ""
    return f"{phase}{part}{where}"
