"""Hashes of the data files of a run: a record must not stand for files that have changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from forgetless.data.spec import DataSpec


def hash_files(specs: Sequence[DataSpec]) -> dict[str, str]:
    """Path of every file behind the specs, with the first 16 digits of its SHA-256."""
    found: dict[str, str] = {}
    for spec in specs:
        if spec.path is None:
            continue
        path = spec.path.expanduser()
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            if str(file) not in found:
                with file.open("rb") as content:
                    found[str(file)] = hashlib.file_digest(content, "sha256").hexdigest()[:16]
    return found


def changed_files(specs: Sequence[DataSpec], before: Mapping[str, str]) -> list[str]:
    """Files behind the specs whose content is another than `before`.

    One that is gone, or that nothing is known of, has not changed.
    """
    known = [
        spec for spec in specs if spec.path is not None and Path(spec.path).expanduser().exists()
    ]
    now = hash_files(known)
    return [file for file, found in now.items() if before.get(file, found) != found]
