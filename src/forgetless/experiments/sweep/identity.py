"""Which run a recipe is: a hash of all that its adapter follows from, and a name for its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from forgetless.experiments.output import is_free
from forgetless.methods import ALL_METHODS, make_any_method
from forgetless.methods.lora import LoRAWeightDecay
from forgetless.named import Named
from forgetless.recipe import Recipe
from forgetless.training.regularisers import REGULARISERS

_DIGITS = 10
_LONGEST = 48  # characters of a name before its hash


def sparse(recipe: Recipe) -> Recipe:
    """The same recipe, without options of methods and regularisers that are at their defaults.

    Two ways to write one method become one recipe: `lora-wd` is `lora` with its decay, and a rate
    that is not given is the method's own.
    """
    method, decay = dict(recipe.method), recipe.training.weight_decay
    if method["name"] == "lora-wd":
        decay = LoRAWeightDecay.default_weight_decay if decay is None else decay
        method["name"] = "lora"
    rate = recipe.training.learning_rate
    if rate is None:
        rate = make_any_method(method).default_learning_rate
    if decay == ALL_METHODS[method["name"]].default_weight_decay:
        decay = None
    method = _sparse(method, ALL_METHODS)
    regularisers = [_sparse(one, REGULARISERS) for one in recipe.training.regularisers]
    training = recipe.training.model_copy(
        update={"regularisers": regularisers, "weight_decay": decay, "learning_rate": rate}
    )
    return recipe.model_copy(update={"method": method, "training": training})


def run_hash(recipe: Recipe) -> str:
    """Hash of a sparse recipe: 10 hex digits.

    What changes no figure is left out, and what is measured: a run that is measured on more is the
    same run, as `forgetless run` has it. Keys at their defaults are left out too, so that a key
    that a later version brings changes no hash.
    """
    tree = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True, fallback=repr)
    described = json.dumps(_plain(_without_free(tree)), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(described.encode()).hexdigest()[:_DIGITS]


def run_name(recipe: Recipe) -> str:
    """`sc-lora-beta0.8-lr0.001-seed1-0123456789`: a folder's name, by the recipe alone."""
    words = [_named(recipe.method), *(f"+{_named(one)}" for one in recipe.training.regularisers)]
    if recipe.training.learning_rate is not None:
        words.append(f"lr{recipe.training.learning_rate:g}")
    if recipe.training.weight_decay is not None:
        words.append(f"wd{recipe.training.weight_decay:g}")
    words.append(f"seed{recipe.seed}")
    readable = re.sub(r"[^A-Za-z0-9.+-]+", "-", "-".join(words).replace("-+", "+"))
    return f"{readable[:_LONGEST].strip('-.')}-{run_hash(recipe)}"


def _sparse(options: Mapping[str, Any], kinds: Mapping[str, type[Named]]) -> dict[str, Any]:
    kind = kinds[options["name"]]
    defaults = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    changed = {k: v for k, v in options.items() if k != "name" and defaults[k] != v}
    return {"name": options["name"], **dict(sorted(changed.items()))}


def _named(options: Mapping[str, Any]) -> str:
    return "-".join([str(options["name"]), *(f"{k}{v}" for k, v in options.items() if k != "name")])


def _without_free(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if is_free(path):
            continue
        kept[key] = _without_free(value, f"{path}.") if isinstance(value, dict) else value
    # A part of which nothing is left is at its defaults.
    return {key: value for key, value in kept.items() if value != {}}


def _plain(value: Any) -> Any:
    """Equal numbers alike: 1 and 1.0 are one value."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
