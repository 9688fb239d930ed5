"""Where downloads and results that are worth keeping between runs lie, and who makes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock


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
