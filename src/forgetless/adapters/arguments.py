"""The arguments of `attach`, checked before anything slow begins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from peft import PeftModel
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.data.spec import SourceWeights
from forgetless.errors import AdapterError
from forgetless.models.untouched import refuse_touched_base

MAX_SEED = 2**63 - 1
_BYTES = TypeAdapter(ByteSize)
ADAPTER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def check_arguments(
    model: object,
    tokenizer: object,
    *,
    source_weights: object,
    batch_size: object,
    min_tokens: object,
    cache: Path | None,
    adapter: object,
    seed: object,
    in_place: bool = False,
) -> None:
    """Refuse what would fail later, deep in torch or PEFT.

    `in_place` says that the model holds the adapter already, and is meant to.

    Raises:
        AdapterError: Names the argument.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise AdapterError(
            "model: expected a transformers model or a PeftModel, got "
            f"{type(model).__name__}; call attach(model, tokenizer, ...)"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise AdapterError(
            f"tokenizer: expected the model's tokenizer, got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer and call attach(model, tokenizer, ...)"
        )
    if source_weights not in get_args(SourceWeights):
        raise AdapterError(
            f"source_weights: expected {' or '.join(get_args(SourceWeights))}, got "
            f"{source_weights!r}; take tokens to count every token once"
        )
    _check_whole("batch_size", batch_size, 1, "rows in a forward pass, such as 8")
    if min_tokens is not None:
        _check_whole("min_tokens", min_tokens, 1, "or leave it out for the widest layer's width")
    _check_whole("seed", seed, 0, "take 0 if in doubt")
    _check_adapter_name(adapter)
    if not in_place and isinstance(model, PeftModel) and adapter in model.peft_config:
        raise AdapterError(f"adapter {adapter!r}: already there; give adapter= another name")
    refuse_touched_base(model)
    if cache is not None and cache.exists() and not cache.is_dir():
        raise AdapterError(
            f"cache: expected a folder, got the file {str(cache)!r}; name another place"
        )


def parse_bytes(value: object, name: str) -> int | None:
    """Bytes from a number or from a text such as "8GiB"; None stays None.

    Raises:
        AdapterError: Neither, or less than 1.
    """
    if value is None:
        return None
    try:
        found = int(_BYTES.validate_python(value))
    except ValidationError:
        found = 0
    if isinstance(value, bool) or found < 1:
        raise AdapterError(
            f"{name}: expected bytes, such as 8GiB or 500MB, got {value!r}; leave it out to take "
            "what is free"
        )
    return found


def _check_whole(name: str, value: object, least: int, hint: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= MAX_SEED:  # type: ignore[operator]
        top = " to 2**63 - 1" if name == "seed" else " or more"
        raise AdapterError(f"{name}: expected a whole number, {least}{top}, got {value!r}; {hint}")


def _check_adapter_name(adapter: object) -> None:
    """PEFT keeps adapters in a ModuleDict, where dots and the names of its methods are no keys."""
    good = isinstance(adapter, str) and ADAPTER_NAME.fullmatch(adapter) is not None
    if not good or hasattr(nn.ModuleDict(), str(adapter)) or "lora_" in str(adapter):
        raise AdapterError(
            "adapter: expected a name of letters, digits, _ and - that torch and PEFT do not use "
            f"themselves, got {adapter!r}; take another, such as 'default' or 'task_1'"
        )
