"""Stamps of a local model's files: a record must not stand for a model that has changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from forgetless.models.load import DEMO

_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".gguf", ".model", ".jinja"})


def stamp_model(name: str) -> dict[str, str]:
    """Name of every file of a local model with its size, time and SHA-256; none of `demo` or a hub.

    The time is a shortcut only: where it and the size are the same, nothing needs to be read again.
    """
    return {file.name: f"{_glance(file)} {_digest(file)}" for file in _files(name)}


def changed_model_files(name: str, before: Mapping[str, str]) -> list[str]:
    """Files of a local model that are new, gone or of another content than in the stamps `before`.

    A model whose folder is gone, or that nothing is known of, has not changed.
    """
    files = {file.name: file for file in _files(name)}
    if not files or not before:
        return []
    return [
        known
        for known in sorted(files.keys() | before.keys())
        if known not in files or known not in before or _differs(files[known], before[known])
    ]


def _files(name: str) -> list[Path]:
    folder = Path(name).expanduser()
    if name == DEMO or not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())


def _differs(file: Path, stamp: str) -> bool:
    glance, _, digest = stamp.rpartition(" ")
    return _glance(file) != glance and _digest(file) != digest


def _glance(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]
