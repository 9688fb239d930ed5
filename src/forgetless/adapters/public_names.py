"""What stands in public for the names of one machine: of a path its last part only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.data.spec import FILE_SUFFIXES
from forgetless.escaping import clean
from forgetless.models.demo_model import FOLDER, HUB_ID
from forgetless.models.load import DEMO

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_NUMBER = re.compile(r" \(\d+\)$")  # what sets items of one name apart
# Keys of a recipe that hold paths, or names which are paths by default; and what is left out.
_PATHS = frozenset({"path", "include_path", "data_files"})
_NAMES = frozenset({"hub", "name", "task"})
_PRIVATE = frozenset({"output"})


def is_local_base(name: str) -> bool:
    """Whether a base model's name means something on this machine only."""
    path = Path(name)
    if not name or name == DEMO or path.name == FOLDER:
        return False
    return not _HUB_ID.fullmatch(name) or path.is_dir()


def base_label(name: str) -> str:
    """What to call a base model in public: its hub id; of a local folder its own name only."""
    if name == DEMO or Path(name).name == FOLDER:
        return HUB_ID
    return clean(Path(name).expanduser().absolute().name) if is_local_base(name) else name


def public_name(name: str) -> str:
    """A name as it is; of one that is a path, as data have by default, its last part."""
    is_file = _NUMBER.sub("", name).lower().endswith(FILE_SUFFIXES)
    return _last_part(name) if is_file or name.startswith(("/", "~", ".")) else name


def public_recipe(value: Any) -> Any:
    """A recipe without unset keys, rows given in Python, paths, and where its output lies."""
    if isinstance(value, Mapping):
        is_set = {k: v for k, v in value.items() if v is not None and (k, v) != ("self", False)}
        return {k: _public_value(k, v) for k, v in is_set.items() if k not in _PRIVATE}
    if isinstance(value, list):
        return [public_recipe(entry) for entry in value]
    return value


def _public_value(key: str, value: Any) -> Any:
    if key == "examples":
        count = f"{len(value)} " if isinstance(value, list) else ""
        return f"{count}row{'' if count == '1 ' else 's'} given in Python"
    if key in _PATHS and isinstance(value, Mapping):
        return {name: _last_part(str(path)) for name, path in value.items()}
    if not isinstance(value, str):
        return public_recipe(value)
    if key == "model":
        return base_label(value)
    if key in _PATHS:
        return _last_part(value)
    return public_name(value) if key in _NAMES else value


def _last_part(path: str) -> str:
    return Path(path).expanduser().absolute().name
