"""Write the files of a folder whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from forgetless.adapters.card import CARD, is_own_card
from forgetless.adapters.exported_files import ExportKind, kinds_in
from forgetless.adapters.load import CONFIG
from forgetless.errors import AdapterError


@contextmanager
def written_into(folder: Path, what: str, kind: ExportKind) -> Iterator[Path]:
    """A folder to write into, inside `folder`; its files are moved out of it at the end.

    The adapter configuration is moved last: a folder without one is no adapter to anybody.

    Args:
        folder: Made where it does not exist; what stands there is replaced file by file.
        what: Begins the message.
        kind: What is written; an earlier export of this kind is replaced.

    Raises:
        AdapterError: The disk is full, or the folder cannot be written; it holds an export of
            another kind, or a README.md that is not ours.
    """
    _refuse_others_files(folder, what, kind)
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


def _refuse_others_files(folder: Path, what: str, kind: ExportKind) -> None:
    """Two exports in one folder: a library would open one of them under the card of the other."""
    other = next((found for found in kinds_in(folder) if found != kind), None)
    if other is not None:
        raise AdapterError(
            f"{what}: expected a folder for {kind.name}, got {folder}, which holds {other.name}; "
            "choose another folder, or remove that one first"
        )
    if (folder / CARD).is_file() and not is_own_card(folder / CARD):
        raise AdapterError(
            f"{what}: expected a folder without {CARD}, or with that of an earlier export, got "
            f"{folder / CARD}, which would be replaced; choose another folder, or move it away"
        )
