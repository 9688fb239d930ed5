"""Which base an adapter belongs to: written into an export, compared where an adapter is opened.

Three values: a fingerprint of all weights; one of the embeddings and norms, which no quantisation
touches; and how the base was quantised. An adapter that was trained beside a quantised base has no
fingerprint of all weights, and opens on that base quantised in any way, or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from forgetless.errors import AdapterError, ForgetlessWarning
from forgetless.models.fingerprint import rounded_fingerprint, unquantized_fingerprint
from forgetless.models.quantization import quantization_of
from forgetless.models.targets import base_of

KEY = "forgetless_base"
UNQUANTIZED = "forgetless_base_unquantized"
QUANTIZATION = "forgetless_base_quantization"
NOT_QUANTIZED = "none"


def base_metadata(base: PreTrainedModel) -> dict[str, str]:
    """What the tensor file of an export says of its base, as far as that has fingerprints."""
    found = {
        KEY: rounded_fingerprint(base),
        UNQUANTIZED: unquantized_fingerprint(base),
        QUANTIZATION: quantization_of(base.config) or NOT_QUANTIZED,
    }
    return {key: value for key, value in found.items() if value is not None}


def check_base(base: PreTrainedModel | PeftModel, weights: Path, named: str | None) -> None:
    """Refuse to open an adapter on another base than its own, where its file tells that apart.

    Args:
        base: What it is to be opened on.
        weights: The adapter's tensor file.
        named: The base that the adapter's configuration names.

    Raises:
        AdapterError: The file holds the fingerprint of another base.

    Warns:
        ForgetlessWarning: No fingerprint can be compared, and the names differ; or the base is
            quantised otherwise than the one that the adapter was trained on.
    """
    with safe_open(weights, framework="pt") as file:
        known = file.metadata() or {}
    name = base_of(base).config.name_or_path
    theirs, ours = _comparable(known, base)
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
    trained_on = known.get(QUANTIZATION)
    opened_on = quantization_of(base_of(base).config) or NOT_QUANTIZED
    if trained_on is not None and trained_on != opened_on:
        warnings.warn(
            f"{weights.parent}: was trained on its base with quantisation {trained_on}, and is "
            f"opened with quantisation {opened_on}: what it does differs by the error of that "
            "quantisation",
            ForgetlessWarning,
            stacklevel=3,
        )


def _comparable(
    known: Mapping[str, str], base: PreTrainedModel | PeftModel
) -> tuple[str | None, str | None]:
    """Fingerprints, theirs and ours, of all weights; else of what no quantisation touches."""
    for key, fingerprint in ((KEY, rounded_fingerprint), (UNQUANTIZED, unquantized_fingerprint)):
        ours = fingerprint(base) if key in known else None
        if ours is not None:
            return known[key], ours
    return None, None


def _last_part(name: str) -> str:
    """A model's name without its owner or folder: the same model may lie in several places."""
    return Path(name).name.lower()
