"""The YAML under a recipe: read from a file, and overridden key by key."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from forgetless.data.validation import TEXT_KINDS, key_path, shortened
from forgetless.errors import RecipeError

# Keys that hold a list, or its one entry.
_LISTS = frozenset({"train_data", "preserve_data", "evaluation.gain", "evaluation.retention"})


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-3` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are all different."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key `{key.value}` is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, which PyYAML speaks, wants a point in a float: without this, 1e-3 is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        RecipeError: The file cannot be read, or holds no mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as failure:
        raise RecipeError(f"{path}: expected UTF-8 text ({failure.reason})") from None
    except OSError as failure:
        raise RecipeError(f"{path}: could not be read ({failure.strerror})") from None
    except ValueError as failure:  # no path at all: a NUL in it
        raise RecipeError(f"{str(path)!r}: could not be read ({failure})") from None
    except yaml.YAMLError as failure:
        raise RecipeError(f"{path}: {_yaml_fault(failure)}") from None
    if tree is None:
        raise RecipeError(
            f"{path}: expected a mapping of recipe keys, but the file is empty; see recipes/"
        )
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: expected a mapping of recipe keys, got {shortened(tree)}; see recipes/"
        )
    return tree


def _yaml_fault(failure: yaml.YAMLError) -> str:
    if isinstance(failure, yaml.MarkedYAMLError) and failure.problem_mark is not None:
        line = failure.problem_mark.line + 1
        if "<document start>" in str(failure.problem):  # JSON lines, prose, a second document
            return f"line {line}: expected one YAML recipe (a mapping of keys), got more than that"
        return f"line {line}: not a valid recipe: {failure.problem}"
    return f"not YAML ({' '.join(str(failure).split())[:120]})"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of the tree; mappings on the way are made where there are none.

    Raises:
        RecipeError: No `key.path=value`, no YAML in it, or no such place.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r}: expected key.path=value, got no such pair")
    try:
        value = _value(text)
        comment = _comment(text)
    except yaml.YAMLError as failure:
        raise RecipeError(
            f"override {override!r}: {_yaml_fault(failure)}; quote the value"
        ) from None
    if comment:
        raise RecipeError(
            f"override {override!r}: expected a value alone, got {comment!r}, which is a comment "
            f"in YAML{_quoted(path, text)}"
        )
    set_value(tree, keys, value, f"override {override!r}")


def set_value(tree: dict[str, Any], keys: Sequence[str], value: object, where: str) -> None:
    """Set one key of the tree by its path; mappings on the way are made where there are none.

    Args:
        tree: What a recipe's file holds; changed in place.
        keys: The path; list entries by number.
        value: As YAML gives it.
        where: Begins the message.

    Raises:
        RecipeError: No such place.
    """
    node: Any = tree
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        if isinstance(node, list):
            index = _index(node, key, keys[:depth], where)
            if is_last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if is_last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                if ".".join(keys[: depth + 1]) in _LISTS and keys[depth + 1].isdecimal():
                    node[key] = _as_list(node[key])
                node = node[key]
        else:
            raise RecipeError(
                f"{where}: expected a mapping or a list at {key_path(*keys[:depth])}"
                f", got {shortened(node)}; override that key as a whole"
            )


def quoting_hint(message: str, overrides: Sequence[str]) -> str:
    """What to do where YAML has read an overridden text as something else, such as a number."""
    for override in overrides:
        path, _, text = override.partition("=")
        value = _value(text)
        wants_text = any(f"expected {kind}, got" in message for kind in TEXT_KINDS)
        misread = isinstance(value, dict) or (wants_text and not isinstance(value, str | list))
        if message.startswith(f"{path.strip()}:") and misread and value is not None:
            return _quoted(path, text)
    return ""


def _quoted(path: str, text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return f"; to give text, quote the value: {shlex.quote(f'{path.strip()}={quoted}')}"


def _comment(text: str) -> str:
    """What YAML passes over at the end of a value; empty where it reads all of it."""
    node = yaml.compose(text, Loader=_Loader)
    rest = text if node is None else text[node.end_mark.index :]
    return rest.strip()


def _as_list(node: object) -> object:
    """A single data spec as the list of one that it stands for."""
    return [node] if isinstance(node, dict) and node else node


def _value(text: str) -> object:
    return yaml.load(text, Loader=_Loader)


def _index(node: list[Any], key: str, parents: Sequence[str], where: str) -> int:
    if not key.isdecimal() or int(key) >= len(node):
        last = len(node) - 1
        numbers = f"a number from 0 to {last}" if last > 0 else "0, its only entry," if node else ""
        raise RecipeError(
            f"{where}: expected {numbers or 'no number, as it is empty,'} behind "
            f"{key_path(*parents)}, which is a list, got {key!r}"
        )
    return int(key)
