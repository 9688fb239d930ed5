"""Which base an adapter belongs to: written into an export, compared where an adapter is opened."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from forgetless.errors import AdapterError, ForgetlessWarning
from forgetless.models.fingerprint import rounded_fingerprint
from forgetless.models.targets import base_of

KEY = "forgetless_base"


def base_metadata(base: PreTrainedModel) -> dict[str, str]:
    """What the tensor file of an export says of its base; nothing where that has no fingerprint."""
    found = rounded_fingerprint(base)
    return {} if found is None else {KEY: found}


def check_base(base: PreTrainedModel | PeftModel, weights: Path, named: str | None) -> None:
    """Refuse to open an adapter on another base than its own, where its file tells that apart.

    Args:
        base: What it is to be opened on.
        weights: The adapter's tensor file.
        named: The base that the adapter's configuration names.

    Raises:
        AdapterError: The file holds the fingerprint of another base.

    Warns:
        ForgetlessWarning: No fingerprint can be compared, and the names differ.
    """
    with safe_open(weights, framework="pt") as file:
        theirs = (file.metadata() or {}).get(KEY)
    ours = None if theirs is None else rounded_fingerprint(base)
    name = base_of(base).config.name_or_path
    if theirs is not None and ours is not None:
        if theirs != ours:
            raise AdapterError(
                f"{weights.parent}: expected its own base ({named or 'unnamed'}, fingerprint "
                f"{theirs}), got {name or 'another model'} (fingerprint {ours}); load the base "
                "that the adapter was trained on"
            )
    elif named and name and _last_part(named) != _last_part(name):
        warnings.warn(
            f"{weights.parent}: was trained on {named}, and is opened on {name}; where these are "
            "different models, no figure of it means anything",
            ForgetlessWarning,
            stacklevel=3,
        )


def _last_part(name: str) -> str:
    """A model's name without its owner or folder: the same model may lie in several places."""
    return Path(name).name.lower()
