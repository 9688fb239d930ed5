"""What kind of file a GGUF file is, from its first bytes; without the package gguf."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from forgetless.errors import ArtefactError

_MAGIC = b"GGUF"
_TYPE = "general.type"
_STRING = 8
# Bytes of a value by its code: integers, floats, bool. An array (9) comes after the general keys.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_LONGEST = 65_536  # of a key or value here; a damaged length is not read


def gguf_type(path: Path) -> str | None:
    """`general.type`, such as `adapter` or `model`; None where the first keys do not tell.

    Raises:
        ArtefactError: No GGUF file, or a truncated one.
    """
    try:
        with path.open("rb") as file:
            return _read_type(file)
    except (OSError, ValueError, struct.error) as error:
        raise ArtefactError(
            f"{path}: expected a GGUF file, got another or a truncated one ({error}); export it "
            "again"
        ) from error


def _read_type(file: BinaryIO) -> str | None:
    magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(f"it begins with {magic!r}")
    _, _, count = struct.unpack("<IQQ", file.read(20))
    for _ in range(count):
        key = _text(file)
        (code,) = struct.unpack("<I", file.read(4))
        if code == _STRING:
            value = _text(file)
            if key == _TYPE:
                return value
        elif code in _SIZES:
            file.read(_SIZES[code])
        else:
            return None
    return None


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST:
        raise ValueError(f"a text of {length} bytes")
    return file.read(length).decode("utf-8")
