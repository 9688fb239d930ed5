"""Write a file so that a reader, even after a kill, finds it old or new, never half written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` to `path` through a synced temporary file beside it and a rename.

    The temporary file's name holds the process id, so that two processes never share one.
    """
    return replace_with(path, lambda temporary: temporary.write_text(text, "utf-8", newline="\n"))


def replace_with(path: Path, write: Callable[[Path], object]) -> Path:
    """The same for what `write` leaves in the file that it is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
