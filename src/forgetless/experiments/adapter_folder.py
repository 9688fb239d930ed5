"""Which folder holds the adapter that a user names: the folder itself, or a run's."""

from __future__ import annotations

from pathlib import Path

from forgetless.adapters.load import CONFIG, found_instead
from forgetless.errors import AdapterError


def adapter_folder(source: Path) -> Path:
    """The folder itself, or the adapter in a run folder.

    Raises:
        AdapterError: There is none; the checkpoints of a run that is not finished are named.
    """
    for folder in (source, source / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    if (source / "model" / "config.json").is_file():
        raise AdapterError(
            f"{source}: expected an adapter, got a run that trained every weight; its model lies "
            f"ready in {source / 'model'}"
        )
    found = [
        path.parent for depth in ("*", "checkpoints/*") for path in source.glob(f"{depth}/{CONFIG}")
    ]
    if found:
        newest = max(found, key=lambda folder: (folder / CONFIG).stat().st_mtime)
        count, named = f"{len(found)} checkpoints", f"one of them, such as {newest}"
        if len(found) == 1:
            count, named = "1 checkpoint", f"that: {newest}"
        raise AdapterError(
            f"{source}: expected an adapter or a finished run, got {count}; finish the run, or "
            f"name {named}"
        )
    raise AdapterError(
        f"{source}: expected a folder with {CONFIG}, or a run, found {found_instead(source)}"
    )
