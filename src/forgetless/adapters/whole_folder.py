"""Write the files of a folder whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from forgetless.adapters.load import CONFIG
from forgetless.errors import AdapterError


@contextmanager
def written_into(folder: Path, what: str) -> Iterator[Path]:
    """A folder to write into, inside `folder`; its files are moved out of it at the end.

    The adapter configuration is moved last: a folder without one is no adapter to anybody.

    Args:
        folder: Made where it does not exist; what stands there is replaced file by file.
        what: Begins the message.

    Raises:
        AdapterError: The disk is full, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as name:
            workplace = Path(name)
            yield workplace
            for path in sorted(workplace.iterdir(), key=lambda path: (path.name == CONFIG, path)):
                path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{what}: could not write {folder} ({str(error).strip()}); free some space, or choose "
            "another folder"
        ) from error
