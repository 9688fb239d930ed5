"""Printing: text and JSON for standard output, and who hears of progress."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from forgetless.errors import ForgetlessError
from forgetless.escaping import one_line

if TYPE_CHECKING:
    from forgetless.console import TerminalProgress
    from forgetless.experiments.record import Record

TOGETHER = "\N{NO-BREAK SPACE}"  # a space at which no line is broken
WIDTH = 79


def print_text(text: str) -> None:
    """A result, as it stands."""
    Console(highlight=False, soft_wrap=True, markup=False).print(text)


def print_json(values: Mapping[str, Any]) -> None:
    """A result as one JSON object on one line; what is not finite becomes null."""
    sys.stdout.write(json.dumps(_finite(values), allow_nan=False) + "\n")


@contextlib.contextmanager
def results_only(as_json: bool) -> Iterator[None]:
    """Inside the block, what a library prints goes to standard error where JSON is wanted."""
    if not as_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def again() -> str:
    """The command that the user typed, to type again."""
    return shlex.join(["forgetless", *sys.argv[1:]])


@contextlib.contextmanager
def told_on_stop() -> Iterator[None]:
    """Say on Ctrl-C, also while modules load, how to run again."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"  stopped; run it again with this command:\n{again()}\n")
        raise


def progress_of(quiet: bool, verbose: bool) -> TerminalProgress:
    """Who hears of progress, at the level of the two switches.

    Raises:
        ForgetlessError: Both are set.
    """
    from forgetless.console import TerminalProgress

    if quiet and verbose:
        raise ForgetlessError("--quiet, --verbose: expected one of the two, got both")
    return TerminalProgress(level="quiet" if quiet else "verbose" if verbose else "normal")


def print_summary(records: Sequence[Record]) -> None:
    """What was kept and gained, in a few lines."""
    from forgetless.experiments.report import summary_lines

    print_text("")
    for line in summary_lines(records):
        print_text(line)


def wrapped(label: str, text: str) -> str:
    """A label and a text behind it, wrapped to 79 columns with a hanging indent."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"  {label:<9}",
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
    ).replace(TOGETHER, " ")


def print_values(values: Mapping[str, Any], indent: int = 0) -> None:
    """Nested plain values as labelled lines; what is empty or unknown is left out."""
    known = {key: value for key, value in values.items() if value not in (None, [], {}, "")}
    width = max((len(key) for key in known), default=0) + 2
    for key, value in known.items():
        label = key.replace("_", " ")
        if isinstance(value, Mapping) and any(
            isinstance(v, Mapping | list) for v in value.values()
        ):
            print_text(f"{' ' * indent}{label}")
            print_values(value, indent + 2)
        elif isinstance(value, list) and any(_is_long(entry) for entry in value):
            print_text(f"{' ' * indent}{label}")
            for entry in value:
                _print_labelled("-", _shown(entry), indent + 2, width=2)
        else:
            _print_labelled(label, _shown(value, key), indent, width=width)


def _is_long(entry: object) -> bool:
    """Whether an entry takes a line of its own."""
    return isinstance(entry, Mapping) or (isinstance(entry, str) and " " in entry)


def _print_labelled(label: str, text: str, indent: int, *, width: int) -> None:
    print_text(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"{' ' * indent}{label:<{width}}",
            subsequent_indent=" " * (indent + width),
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _shown(value: object, key: str = "") -> str:
    from forgetless.experiments.numbers import count_text, plain

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value / 2**20:.1f} MiB" if key == "bytes" else count_text(value)
    if isinstance(value, float):
        return f"{value:g}" if value == round(value, 6) else plain(value)
    if isinstance(value, Mapping):
        pairs = ((k, v) for k, v in value.items() if v is not None)
        return ", ".join(f"{str(k).replace('_', ' ')} {_shown(v, str(k))}" for k, v in pairs)
    if isinstance(value, list | tuple):
        return ", ".join(_shown(entry, key) for entry in value)
    return one_line(str(value))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
