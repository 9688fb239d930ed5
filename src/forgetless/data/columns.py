"""Which templates fit the columns of a source that somebody else named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.data.templates import fill
from forgetless.errors import DataError

# A column that asks, and one that answers; the first pair that is there is taken.
_PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "answers"),
    ("question", "response"),
    ("question", "solution"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "answer"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
)
_CONVERSATIONS = ("messages", "conversation", "conversations", "chat", "dialogue", "turns")
_TEXTS = ("text", "content", "document", "body", "passage")
_CONTEXTS = ("context", "passage", "input")  # stands before what asks, where it is filled in
_CHECKED_ROWS = 100


def choose_templates(
    records: Sequence[Mapping[str, Any]], where: str, *, chat: bool = False
) -> dict[str, Any]:
    """Keys of a data spec that turn these records into rows: text, prompt, completion, messages.

    Empty where the columns are known without a template. The first hundred records are looked at,
    and rendered to see that it works.

    Args:
        records: Column to value; at least one.
        where: Their source, for messages.
        chat: Whether questions and answers are to be asked as a chat.

    Raises:
        DataError: No template fits: the message lists the columns.
    """
    records = records[:_CHECKED_ROWS]
    columns = [c for c in records[0] if all(c in record for record in records)]
    by_name = {str(column).lower(): column for column in columns}
    conversation = _conversation(records, by_name, where)
    if conversation is not None:
        return {"messages": conversation}
    for asks, answers in _PAIRS:
        if asks in by_name and answers in by_name:
            return _checked(_pair(records, by_name, asks, answers, chat), records, where)
    texts = [c for c in columns if all(isinstance(record[c], str) for record in records)]
    named = [by_name[name] for name in _TEXTS if name in by_name]
    column = named[0] if named else texts[0] if len(texts) == 1 else None
    if column is None or not _is_plain(column):
        raise DataError(
            f"{where}: expected columns such as question and answer, instruction and output, "
            f"messages, or text, got {', '.join(map(str, records[0]))}; rename them, or write "
            "prompt and completion into a copy of a recipe"
        )
    return _checked({"text": f"{{{column}}}"}, records, where)


def _conversation(
    records: Sequence[Mapping[str, Any]], by_name: Mapping[str, str], where: str
) -> str | None:
    for name in _CONVERSATIONS:
        column = by_name.get(name)
        if column is None or not _holds_turns([record[column] for record in records]):
            continue
        for turn in (turn for record in records for turn in record[column]):
            if not {"role", "content"} <= set(turn):
                raise DataError(
                    f"{where}: column {column!r}: expected messages with role and content, got "
                    f"the keys {', '.join(map(str, turn))}; rename them"
                )
        return column
    return None


def _pair(
    records: Sequence[Mapping[str, Any]],
    by_name: Mapping[str, str],
    asks: str,
    answers: str,
    chat: bool,
) -> dict[str, Any]:
    asking, answering = by_name[asks], by_name[answers]
    if (asks, answers) == ("prompt", "completion"):  # as they stand: known, if so named
        if _holds_turns([record[asking] for record in records]) and asking == asks:
            return {}
        return {"prompt": f"{{{asking}}}", "completion": f"{{{answering}}}"}
    context = next(
        (by_name[n] for n in _CONTEXTS if n in by_name and n not in (asks, answers)), None
    )
    is_filled = context is not None and any(record[context] for record in records)
    question = f"{{{asking}}}"
    if chat:
        content = f"{question}\n\n{{{context}}}" if is_filled else question
        return {
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": f"{{{answering}}}"},
            ]
        }
    before = f"{{{context}}}\n\n" if is_filled else ""
    answer = answers.removesuffix("s").capitalize()
    return {
        "prompt": f"{before}{asks.capitalize()}: {question}\n{answer}:",
        "completion": f" {{{answering}}}",
    }


def _checked(
    templates: dict[str, Any], records: Sequence[Mapping[str, Any]], where: str
) -> dict[str, Any]:
    texts = [value for value in templates.values() if isinstance(value, str)]
    texts += [turn["content"] for turn in templates.get("messages", ())]
    for index, record in enumerate(records):
        for text in texts:
            fill(text, record, f"{where}: row {index}")
    return templates


def _holds_turns(values: Sequence[object]) -> bool:
    return all(
        isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)
        for value in values
    )


def _is_plain(column: str) -> bool:
    """Whether a template can name the column."""
    return bool(column) and not any(sign in column for sign in ".[]{}!:")
