"""Where downloads and results that are worth keeping between runs lie, and who makes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from forgetless.processes import ALONE, Processes

_T = TypeVar("_T")


def cache_dir() -> Path:
    """`$FORGETLESS_CACHE`, else `forgetless` in the user's cache folder; not created here."""
    chosen = os.environ.get("FORGETLESS_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "forgetless"


@contextlib.contextmanager
def made_by_one(path: Path | None) -> Iterator[None]:
    """Inside the block no other process is in a block of the same file.

    What is in a cache is looked for again inside: another process may have made it meanwhile. The
    lock goes with the process that holds it, however that ends. Where there can be none (a folder
    that cannot be written, a file system without locks), each makes its own: that costs time only.
    """
    with contextlib.ExitStack() as held:
        if path is not None:
            with contextlib.suppress(OSError, NotImplementedError):
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
        yield


def kept(
    path: Path,
    *,
    take: Callable[[], _T | None],
    make: Callable[[], _T],
    put: Callable[[_T], None],
    processes: Processes = ALONE,
) -> _T:
    """What a file of a cache holds, else what is made and put there.

    Of several programs one makes it, the others wait and read. The processes of one program all
    take it or all make it, and the main one puts it there.

    Args:
        path: The file.
        take: Reads it; None where it is not there, or not usable.
        make: Makes it anew, all processes together.
        put: Writes it.
        processes: Of this program.
    """
    there = path.exists()
    found = take()
    if all(processes.each(found is not None)) and found is not None:
        return found
    with made_by_one(path if processes.is_main else None):
        if not processes.of_main(there):
            found = take()  # another program may have made it meanwhile
            if all(processes.each(found is not None)) and found is not None:
                return found
        made = make()
        if processes.is_main:
            put(made)
        return made
