"""The key under which the base's figures of a task are kept: what they depend on but the base."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import lm_eval
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.evaluation.lm_eval.spec import LmEvalRecipe
from forgetless.evaluation.lm_eval.tasks import OpenTask
from forgetless.evaluation.results import TaskFacts

_PACKAGE = Path(lm_eval.__file__).resolve().parent


def is_known(opened: OpenTask) -> bool:
    """Whether the key says all that the figures depend on.

    A function of the user's can call others that the key does not hold; those of lm-eval's own
    tasks are as its version says.
    """
    return all(
        _from_the_package(function)
        for part in opened.parts
        for function in (type(part), *_functions(vars(part.config)))
    )


def key(
    facts: TaskFacts,
    settings: LmEvalRecipe,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """Task, prompts, and how the model is asked.

    Args:
        facts: Of the task, with the hashes of its configuration and its prompts.
        settings: Padding, and with it rounding, differs by batch size.
        base: For its generation settings, which lm-eval's are laid over.
        tokenizer: The one that is used.
    """
    generation = base.generation_config.to_dict() if base.generation_config is not None else {}
    return [
        facts.config_hash,
        facts.lm_eval,
        facts.rows_hash,
        str(facts.limit),
        str(settings.batch_size),
        json.dumps(generation, sort_keys=True, default=str),
        _tokenizer_hash(tokenizer),
    ]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    text: object = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left over from the last call, and set again at each.
        text = {k: v for k, v in backend.items() if k not in ("truncation", "padding")}
    told = [
        type(tokenizer).__name__,
        text,
        tokenizer.special_tokens_map,
        tokenizer.model_max_length,
        tokenizer.clean_up_tokenization_spaces,
        tokenizer("a")["input_ids"],  # whether text gets tokens of its own before or after it
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _functions(value: Any) -> Iterator[Any]:
    if callable(value):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _functions(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _functions(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _functions(child)


def _from_the_package(function: Any) -> bool:
    try:
        path = Path(inspect.getfile(function))
    except TypeError:  # made without a file, such as a partial
        return False
    return path.resolve().is_relative_to(_PACKAGE)
