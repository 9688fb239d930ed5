"""Where downloads and results that are worth keeping between runs lie."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$FORGETLESS_CACHE`, else `forgetless` in the user's cache folder; not created here."""
    chosen = os.environ.get("FORGETLESS_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "forgetless"
