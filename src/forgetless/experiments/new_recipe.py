"""A first recipe for somebody's model and data: commented, complete, and checked by loading it."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgetless.atomic import write_atomically
from forgetless.data.columns import choose_templates
from forgetless.data.sources import read_records
from forgetless.data.spec import DataSpec
from forgetless.data.templates import fill
from forgetless.errors import DataError, RecipeError
from forgetless.escaping import one_line
from forgetless.methods import make_any_method
from forgetless.methods.base import Method
from forgetless.models.describe import renders_chat
from forgetless.recipe import Recipe, load_recipe

HELD_OUT = 200  # rows at most that are kept apart for evaluation
SELF_ROWS, SELF_HELD_OUT, SELF_LENGTH = 96, 32, 256
SHORT_ANSWER = 5  # words: answers up to this length are compared as texts
_COMMENT_COLUMN = 38


@dataclass(frozen=True, slots=True)
class NewRecipe:
    """What was written.

    Attributes:
        path: The recipe.
        recipe: As it loads.
        notes: What its user should know.
    """

    path: Path
    recipe: Recipe
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """One file or folder, its rows split into those to use and those held out."""

    name: str
    used: dict[str, Any]
    held: dict[str, Any]
    short_answers: bool
    shared: int


def write_recipe(
    path: Path,
    *,
    train: str,
    test: str | None = None,
    preserve: Sequence[str] = (),
    own_text: bool = True,
    model: str = "demo",
    method: str = "lora-null",
    force: bool = False,
) -> NewRecipe:
    """Look at the columns of the data, choose templates, and write a recipe that loads.

    Args:
        path: File to write.
        train: A file or folder of what is to be learned.
        test: One of what it is tested on; the last rows of `train` are held out where not given.
        preserve: Files or folders of what must not be forgotten.
        own_text: Whether text that the model itself writes must not be forgotten either: of what
            was tried, the most is kept with both, each counting alike (docs/calibration.md).
        model: Hub id, path or `demo`.
        method: Name of a method.
        force: Whether a file of that name may be replaced.

    Raises:
        RecipeError: The file exists, or the result does not load.
        DataError: A file that cannot be read, is too short, or whose columns fit no template.
        MethodError: No such method.
    """
    if path.is_dir() or (path.exists() and not force):
        got = "a folder" if path.is_dir() else "one; --force replaces it"
        raise RecipeError(f"{path}: expected no file of that name yet, got {got}")
    needs = make_any_method(method).needs
    chat = renders_chat(model)
    learned = _source(train, chat, test)
    files = [name for name in preserve if name != "self"]
    kept = [_source(name, chat, None) for name in files]
    own = own_text or len(files) < len(preserve)
    if "preserve" in needs and not (kept or own):
        raise RecipeError(
            f"preserve: expected something to keep, as the method {method} calibrates on it, got "
            "nothing; name a file, or leave the model's own text in"
        )
    text = _text(path, model, method, learned, [*kept, None] if own else kept)
    with tempfile.TemporaryDirectory() as folder:
        draft = write_atomically(Path(folder) / path.name, text)
        recipe = load_recipe(draft)
    write_atomically(path, text)
    return NewRecipe(path, recipe, _notes(chat, model, [learned, *kept]))


def _source(name: str, chat: bool | None, test: str | None) -> _Source:
    records = _records(name)
    templates = choose_templates(records, name, chat=bool(chat))
    if "messages" in templates and chat is False:
        raise DataError(
            f"{name}: expected a model with a chat template for its messages, got one without; "
            "name a chat model, or write prompt and completion"
        )
    if test is not None:
        held = _records(test)
        apart = {"path": test} | choose_templates(held, test, chat=bool(chat))
        return _Source(name, {"path": name} | templates, apart, _short(held, apart), 0)
    if len(records) < 2:
        raise DataError(f"{name}: expected at least 2 rows, as one is held out, got 1; add rows")
    split = len(records) - min(HELD_OUT, max(1, len(records) // 10))
    seen = {_key(record) for record in records[:split]}
    return _Source(
        name,
        {"path": name, "rows": [0, split]} | templates,
        {"path": name, "rows": [split, len(records)]} | templates,
        _short(records[split:], templates),
        sum(_key(record) in seen for record in records[split:]),
    )


def _records(name: str) -> list[Mapping[str, Any]]:
    return [placed.record for placed in read_records(DataSpec(path=Path(name)))]


def _key(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, default=str)


def _short(records: Sequence[Mapping[str, Any]], templates: Mapping[str, Any]) -> bool:
    """Whether every answer is a few words, so that it can be compared as a text."""
    answer = templates.get("completion")
    if isinstance(templates.get("messages"), list):
        answer = templates["messages"][-1]["content"]
    return answer is not None and all(
        len(fill(answer, record, "").split()) <= SHORT_ANSWER for record in records
    )


def _notes(chat: bool | None, model: str, sources: Sequence[_Source]) -> tuple[str, ...]:
    notes = [
        f"{source.name}: {source.shared} of the rows held out stand among the others too; remove "
        "the double ones, or the run will refuse them"
        for source in sources
        if source.shared
    ]
    if chat is None:
        notes.append(
            f"model {model}: not fetched yet, so that nothing is known of a chat template; "
            "questions and answers are written as plain text"
        )
    return tuple(notes)


def _text(
    path: Path, model: str, method: str, learned: _Source, kept: Sequence[_Source | None]
) -> str:
    made = make_any_method(method)
    own = {"self": True, "rows": [0, SELF_ROWS], "max_length": SELF_LENGTH}
    own_held = {
        "self": True,
        "rows": [SELF_ROWS, SELF_ROWS + SELF_HELD_OUT],
        "max_length": SELF_LENGTH,
    }
    metrics = ["nll", "exact_match"] if learned.short_answers else ["nll"]
    gain = {"name": "task"} | learned.held | {"metrics": metrics}
    retention = [
        {"name": name} | (own_held if source is None else source.held)
        for name, source in zip(_item_names(kept), kept, strict=True)
    ]
    named = {"name": method} | ({"rank": 32} if isinstance(made, Method) else {})
    rate = f"{made.default_learning_rate:g}"
    equal = _line("  source_weights", "equal", "each source counts alike; or tokens")
    lines = [
        f"# {one_line(shlex.join(['forgetless', 'run', str(path)]))}",
        "#",
        "# Any key can be changed on the command line: training.epochs=2 method.rank=16",
        "# Paths are relative to the folder in which the command runs.",
        "",
        _line("model", model, "hub id, path, or demo"),
        _noted("# quantization: nf4", "or int8, torchao-int8"),
        _line("method", named, "forgetless methods lists them"),
        "",
        "# What is to be learned. {column} is filled in from each row.",
        "train_data:",
        *_mapping(learned.used),
        "",
        "# What must not be forgotten; self is text that the model itself writes.",
        f"preserve_data:{'' if kept else ' []'}",
        *(line for source in kept for line in _entry(own if source is None else source.used)),
        *([] if len(kept) < 2 else ["calibration:", equal]),
        "",
        "training:",
        _line("  epochs", 1),
        _line("  batch_size", 8),
        _noted(f"  # learning_rate: {rate}", "the method's default; tune it first"),
        "",
        "# Held-out rows, measured with the base and with the tuned model.",
        "evaluation:",
        "  gain:",
        *_entry(gain, "    "),
        _noted("  retention:", "metrics: nll and kl"),
        *(line for item in retention for line in _entry(item, "    ")),
        _noted("  # lm_eval: [triviaqa, nq_open]", "tasks of lm-eval: docs/lm-eval.md"),
        "",
        _line("output", f"runs/{path.stem}", "record, report and adapter"),
    ]
    return "\n".join(lines) + "\n"


def _item_names(sources: Sequence[_Source | None]) -> list[str]:
    """Names of evaluation items, all different."""
    names: list[str] = []
    for source in sources:
        stem = "own text" if source is None else Path(source.name).stem or "kept"
        tries = [stem, *(f"{stem} {number}" for number in range(2, len(sources) + 3))]
        names.append(next(name for name in tries if name not in (*names, "task")))
    return names


_COMMENTS = {
    "rows": "from, up to",
    "prompt": "given",
    "completion": "learned",
    "metrics": "also f1, contains, last_number, …",
    "max_length": "tokens a row",
}


def _entry(values: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """A mapping as one entry of a list."""
    lines = _mapping(values, f"{indent}  ")
    return [f"{indent}- {lines[0].lstrip()}", *lines[1:]]


def _mapping(values: Mapping[str, Any], indent: str = "  ") -> list[str]:
    return [_line(f"{indent}{key}", value, _COMMENTS.get(key, "")) for key, value in values.items()]


def _line(key: str, value: object, comment: str = "") -> str:
    return _noted(f"{key}: {_scalar(value)}", comment)


def _noted(line: str, comment: str) -> str:
    """A line with a comment behind it, where both fit."""
    if not comment or len(line) + len(comment) > 76:
        return line
    return f"{line:<{_COMMENT_COLUMN - 1}} # {comment}"


def _scalar(value: object) -> str:
    """A value as YAML on one line; text with line breaks, and messages, quoted."""
    style = '"' if "\n" in str(value) or (isinstance(value, str) and "{" in value) else None
    if isinstance(value, list) and value and isinstance(value[0], dict):
        turns = ", ".join(
            f"{{role: {turn['role']}, content: {_scalar(turn['content'])}}}" for turn in value
        )
        return f"[{turns}]"
    dumped = yaml.safe_dump(
        value,
        default_style=style,
        default_flow_style=True,
        allow_unicode=True,
        sort_keys=False,
        width=10**9,
    )
    return dumped.removesuffix("...\n").rstrip("\n")
