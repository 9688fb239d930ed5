"""What a model folder says of itself, read from its configuration and headers only."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from forgetless.errors import AdapterError, ModelError
from forgetless.models.load import DEMO, LOADING_ERRORS
from forgetless.models.targets import find_targets


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """A base model, unloaded.

    Attributes:
        architecture: Class of the model, as its configuration names it.
        config: The configuration's values.
        parameters: Numbers in its safetensors files; tied ones are stored once. None without such.
        dtypes: Of the tensors there, as safetensors calls them.
        num_bytes: Of the weight files.
        has_chat_template: Whether the tokenizer beside it renders chat messages.
        targets: Layers that get an adapter by default; None where the architecture is not known.
        skipped: Layers with weights that get none, with the reason.
    """

    architecture: str
    config: dict[str, Any]
    parameters: int | None
    dtypes: tuple[str, ...]
    num_bytes: int
    has_chat_template: bool
    targets: tuple[str, ...] | None
    skipped: dict[str, str]


def outline_model(folder: Path) -> ModelOutline:
    """Describe a model folder without loading its weights.

    Raises:
        ModelError: Its configuration or a weight file is truncated or damaged.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder))
        values = config.to_dict()
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{folder}: expected a readable config.json, got: {_first_line(error)}; check its files"
        ) from error
    count, dtypes, size = _weights(folder)
    try:
        with torch.device("meta"):
            selection = find_targets(AutoModelForCausalLM.from_config(config))
        targets, skipped = tuple(selection.targets), selection.skipped
    except (*LOADING_ERRORS, AdapterError, RuntimeError):  # code of its own, or no decoder
        targets, skipped = None, {}
    return ModelOutline(
        architecture=(config.architectures or [type(config).__name__])[0],
        config=values,
        parameters=count or None,
        dtypes=tuple(sorted(dtypes)),
        num_bytes=size,
        has_chat_template=has_chat_template(folder),
        targets=targets,
        skipped=skipped,
    )


def renders_chat(name: str) -> bool | None:
    """Whether the tokenizer of a model, by hub id, path or `demo`, has a chat template.

    None where a hub model has not been fetched yet: nothing is fetched here.
    """
    if name == DEMO:
        return True
    if Path(name).expanduser().is_dir():
        return has_chat_template(Path(name).expanduser())
    try:
        cached = try_to_load_from_cache(name, "tokenizer_config.json")
    except HFValidationError:
        return None
    return has_chat_template(Path(cached).parent) if isinstance(cached, str) else None


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer files in a folder hold a chat template."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and bool(values.get("chat_template"))


def _weights(folder: Path) -> tuple[int, set[str], int]:
    count, size, dtypes = 0, 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(key)
                    count += math.prod(part.get_shape())
                    dtypes.add(str(part.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: truncated or damaged ({error}); copy it again") from error
        size += path.stat().st_size
    return count, dtypes, size


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
