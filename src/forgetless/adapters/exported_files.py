"""The three kinds of export, told apart by what lies in a folder, and the files of each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from forgetless.adapters.card import CARD, front_matter, is_own_card
from forgetless.adapters.compress import FIGURES
from forgetless.adapters.gguf.files import GGUF
from forgetless.adapters.gguf.header import gguf_type
from forgetless.adapters.load import CONFIG, WEIGHTS, read_adapter_config
from forgetless.adapters.plain_lora import beyond_plain_lora
from forgetless.adapters.public_names import is_local_base
from forgetless.adapters.variant import LIVE_BOTH
from forgetless.errors import AdapterError, ArtefactError

_MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = "model*.safetensors"
_MODEL_INDEX = "model.safetensors.index.json"
_MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|tokenizer\.model|spiece\.model|chat_template\.jinja"
)
_REMEDY = "export it first: forgetless export ADAPTER FOLDER"


@dataclass(frozen=True, slots=True)
class ExportKind:
    """What an export may be.

    Attributes:
        name: In a message.
        files: Names that it writes beside the card and `compression.json`.
        is_in: Whether one lies in a folder.
        check: Refuses one that cannot be opened; returns the base that its own files name.
    """

    name: str
    files: re.Pattern[str]
    is_in: Callable[[Path], bool]
    check: Callable[[Path], object]


def kinds_in(folder: Path) -> list[ExportKind]:
    """Which exports lie in a folder; none where it holds something else."""
    return [kind for kind in _KINDS if kind.is_in(folder)]


def exported_files(folder: Path) -> tuple[str, ...]:
    """Names of the files of an export that may be uploaded.

    Raises:
        AdapterError: No export or several, one that nobody else could open, no card of ours, a
            link out of the folder, or a base that is a folder of this machine.
        ArtefactError: Damaged weights.
    """
    kinds = kinds_in(folder)
    if len(kinds) != 1:
        found = " and ".join(kind.name for kind in kinds) or "none"
        remedy = "export each into a folder of its own" if kinds else _REMEDY
        raise AdapterError(
            f"{folder}: expected one exported adapter or model, got {found}; {remedy}"
        )
    [kind] = kinds
    paths = [
        p for p in folder.iterdir() if p.name in (CARD, FIGURES) or kind.files.fullmatch(p.name)
    ]
    for path in paths:
        _refuse_no_file(folder, path)
    base = kind.check(folder)
    if not (folder / CARD).is_file():
        raise AdapterError(f"{folder}: expected the model card {CARD}, found none; {_REMEDY}")
    if not is_own_card(folder / CARD):
        raise AdapterError(
            f"{folder / CARD}: expected the model card of an export, got one without the tag "
            f"forgetless; {_REMEDY}"
        )
    _refuse_base(folder, base or front_matter(folder / CARD).get("base_model"))
    return tuple(sorted(path.name for path in paths))


def _refuse_no_file(folder: Path, path: Path) -> None:
    """A link may lead to what nobody meant to upload; in the hub's cache every file is one."""
    target, home = path.resolve(), folder.resolve()
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    is_blob = snapshots is not None and target.parent == snapshots.parent / "blobs"
    if not target.is_file():
        raise AdapterError(f"{path}: expected a file, got a folder or a broken link; {_REMEDY}")
    if not (is_blob or target.is_relative_to(home)):
        raise AdapterError(
            f"{path}: expected a file of the export, got a link to {target}; put a copy in its "
            "place if it is to be uploaded"
        )


def _check_adapter(folder: Path) -> object:
    config = read_adapter_config(folder)
    if config.get("init_lora_weights") == LIVE_BOTH:
        raise AdapterError(
            f"{folder}: expected an export, got a training checkpoint of the form both, which PEFT "
            f"alone cannot open; {_REMEDY}"
        )
    beyond = beyond_plain_lora(config)
    if config.get("peft_type") != "LORA" or beyond:
        found = ", ".join(beyond) or f"peft_type {config.get('peft_type')}"
        raise AdapterError(f"{folder}: expected plain LoRA, got {found}; {_REMEDY}")
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder}: expected {WEIGHTS}, found none; {_REMEDY}")
    if not any(".lora_A." in name for name in _tensor_names(folder / WEIGHTS)):
        raise AdapterError(f"{folder / WEIGHTS}: expected LoRA tensors, found none; {_REMEDY}")
    return config.get("base_model_name_or_path")


def _check_model(folder: Path) -> None:
    files = {path.name for path in folder.glob(_MODEL_WEIGHTS)} | _shards(folder)
    for name in sorted(files):
        _tensor_names(folder / name)


def _shards(folder: Path) -> set[str]:
    """Files that the index names, where a model is in several."""
    path = folder / _MODEL_INDEX
    if not path.is_file():
        return set()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ArtefactError(f"{path}: damaged ({error}); copy it again") from error


def _check_gguf(folder: Path) -> None:
    kind = gguf_type(folder / GGUF)
    if kind != "adapter":
        raise AdapterError(
            f"{folder / GGUF}: expected a GGUF file of the type adapter, got {kind}; {_REMEDY}"
        )


def _refuse_base(folder: Path, base: object) -> None:
    """What a folder is for must be something that others can load."""
    name = base if isinstance(base, str) else ""
    if not name or is_local_base(name) or Path(name).is_absolute():
        found = f"the local folder {name}" if name else "none, or a local model"
        raise AdapterError(
            f"{folder}: expected a base that others can load, got {found}; export it again with "
            "the base's hub id: --model ORG/NAME, in Python base_name="
        )


def _tensor_names(path: Path) -> list[str]:
    """From the header only."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: truncated or damaged ({error}); copy it again") from error


def _holds_model(folder: Path) -> bool:
    """A `config.json` alone may be anything: that of a program, with its passwords."""
    path = folder / _MODEL_CONFIG
    if not path.is_file() or not any(folder.glob(_MODEL_WEIGHTS)):
        return False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and isinstance(values.get("model_type"), str)


PEFT_LORA = ExportKind(
    "an adapter for PEFT",
    re.compile(f"{re.escape(CONFIG)}|{re.escape(WEIGHTS)}"),
    lambda folder: (folder / CONFIG).is_file(),
    _check_adapter,
)
GGUF_LORA = ExportKind(
    "an adapter for llama.cpp",
    re.compile(re.escape(GGUF)),
    lambda folder: (folder / GGUF).is_file(),
    _check_gguf,
)
WHOLE_MODEL = ExportKind("a whole model", _MODEL_FILES, _holds_model, _check_model)
_KINDS = (PEFT_LORA, GGUF_LORA, WHOLE_MODEL)
