"""From pydantic's findings to one line: which key, what is wrong with it, what was meant."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from forgetless.errors import ForgetlessError, RecipeError

Model = TypeVar("Model", bound=BaseModel)


# What pydantic's findings ask for, where it names Python's classes or its own.
_KINDS = {
    "path_type": "a path",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
TEXT_KINDS = (_KINDS["string_type"], _KINDS["path_type"])


def validated(kind: type[Model], value: object, where: str = "") -> Model:
    """Build a model from plain values.

    Args:
        kind: The pydantic model.
        value: A mapping, as YAML or Python gives it.
        where: Key path of the mapping, to begin the message with; empty at the top.

    Raises:
        RecipeError: One line on the first thing that is wrong, unknown keys before all others.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as failure:
        findings = failure.errors(include_url=False)
        # An unknown key is most often the cause of a missing one: name the cause.
        findings.sort(key=lambda finding: finding["type"] != "extra_forbidden")
        more = f" ({len(findings) - 1} more)" if len(findings) > 1 else ""
        raise RecipeError(_line(kind, findings[0], where) + more) from None


def key_path(*parts: str | int) -> str:
    """`evaluation.gain.0.limit`: the way overrides write it."""
    return ".".join(str(part) for part in parts if part != "")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean `x`?`, or the known words where none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"


def shortened(value: object, width: int = 60) -> str:
    """The value as Python writes it, cut to one short line, its closing quote or bracket kept."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 2]}…{text[-1]}"


def _line(kind: type[BaseModel], finding: ErrorDetails, where: str) -> str:
    *parents, last = finding["loc"] or ("",)
    context = finding.get("ctx", {})
    if finding["type"] == "extra_forbidden":
        known = _keys(_model_at(kind, parents))
        place = key_path(where, *parents)
        return f"{place}{': ' if place else ''}unknown key `{last}`{nearest(str(last), known)}"
    if finding["type"] == "missing":
        place = key_path(where, *parents)
        return f"{place}{': ' if place else ''}expected a key `{last}`, got none; add it"
    if isinstance(context.get("error"), ForgetlessError):
        return str(context["error"])
    place = key_path(where, *parents, last)
    if finding["type"] == "value_error":
        return f"{place}{': ' if place else ''}{context['error']}"
    message = _KINDS.get(finding["type"]) or finding["msg"].removeprefix("Input should be ")
    got = shortened(finding["input"])
    if finding["input"] is None:  # in YAML: a key with nothing behind it
        got = "nothing; give it a value or leave the key out"
    return f"{place}{': ' if place else ''}expected {message}, got {got}"


def _keys(model: type[BaseModel] | None) -> list[str]:
    """Names under which the fields of a model are written in YAML."""
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_at(model: type[BaseModel] | None, path: Iterable[str | int]) -> type[BaseModel] | None:
    """The model that sits under a path of keys and list indices."""
    for key in path:
        if model is None:
            return None
        if isinstance(key, int):
            continue
        fields: Mapping[str, Any] = {f.alias or n: f for n, f in model.model_fields.items()}
        model = _first_model(fields[key].annotation) if key in fields else None
    return model


def _first_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside `X | None`, `list[X]`, `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = _first_model(inner)
        if found is not None:
            return found
    return None
