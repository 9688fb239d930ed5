"""From a source record to a row: templates, known columns and chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from forgetless.data.rows import Row
from forgetless.data.spec import DataSpec
from forgetless.data.templates import fill, list_values
from forgetless.data.validation import shortened
from forgetless.errors import DataError

Message = Mapping[str, Any]


def render(
    record: Mapping[str, Any], spec: DataSpec, tokenizer: PreTrainedTokenizerBase, where: str
) -> Row:
    """Render one record by the spec's template, else by the columns that are known.

    Known columns, in this order: `messages`; `prompt` and `completion`, each text or chat messages
    (a prompt that ends in an assistant's turn is continued by a text completion, as it stands);
    `text`.

    Args:
        record: Column to value.
        spec: What to make of it.
        tokenizer: Its chat template renders messages.
        where: Row, for messages.

    Raises:
        DataError: No template fits, a field is missing, or the chat template refuses the messages.
    """
    found = read_fields(record, spec, where)
    return found if isinstance(found, Row) else _chat_row(found, tokenizer, where)


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that wait for a chat template, with what the last of them is judged by.

    Attributes:
        turns: Messages with role and content.
        accepted: All accepted answers; empty where the last turn is the only one.
        completion: Text that goes on inside the last turn; None where that turn is whole.
    """

    turns: list[Message]
    accepted: tuple[str, ...] = ()
    completion: str | None = None


def read_fields(record: Mapping[str, Any], spec: DataSpec, where: str) -> Row | Chat:
    """Render one record as far as that takes no tokenizer: a row, or messages to be rendered.

    Raises:
        DataError: No template fits, or a field is missing or no text.
    """
    if spec.text is not None:
        return _plain_row("", spec.text, record, where)
    if spec.prompt is not None and spec.completion is not None:
        return _plain_row(fill(spec.prompt, record, where), spec.completion, record, where)
    if isinstance(spec.messages, str):
        if spec.messages not in record:
            raise DataError(
                f"{where}: messages names the column {spec.messages!r}, which is not among the "
                f"columns {', '.join(map(str, record))}"
            )
        return Chat(_as_messages(record[spec.messages], where))
    if spec.messages is not None:
        turns: list[Message] = [
            {"role": turn["role"], "content": fill(turn["content"], record, where)}
            for turn in spec.messages
        ]
        return Chat(turns, list_values(spec.messages[-1]["content"], record, where))
    return _by_known_columns(record, where)


def _by_known_columns(record: Mapping[str, Any], where: str) -> Row | Chat:
    if "messages" in record:
        return Chat(_as_messages(record["messages"], where))
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if not _holds_messages(prompt):
            return _plain_row(fill("{prompt}", record, where), "{completion}", record, where)
        turns = _as_messages(prompt, where)
        if _holds_messages(completion):
            return Chat(turns + _as_messages(completion, where))
        text = fill("{completion}", record, where)
        accepted = list_values("{completion}", record, where)
        if turns[-1]["role"] == "assistant":
            return Chat(turns, accepted, text)
        return Chat([*turns, {"role": "assistant", "content": text}], accepted)
    if "text" in record:
        return _plain_row("", "{text}", record, where)
    raise DataError(
        f"{where}: expected a template (text, prompt + completion, or messages) or one of the "
        "columns text, prompt and completion, messages; got no template and the columns "
        f"{', '.join(map(str, record))}"
    )


def _plain_row(prompt: str, completion: str, record: Mapping[str, Any], where: str) -> Row:
    text = fill(completion, record, where)
    answers = list_values(completion, record, where) or (text.strip(),)
    return Row(prompt=prompt, completion=text, answers=_stripped(answers))


def _chat_row(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> Row:
    """The last turn, the assistant's, is the completion; all that stands before is the prompt."""
    if chat.completion is not None:
        return _continued_row(chat.turns, chat.completion, chat.accepted, tokenizer, where)
    turns, last = chat.turns, chat.turns[-1]
    if len(turns) < 2:
        raise DataError(f"{where}: expected a message before the assistant's, got one message only")
    if last["role"] != "assistant":
        raise DataError(
            f"{where}: expected the last message to be the assistant's, got the role "
            f"{last['role']!r}; it is what the model learns"
        )
    if not isinstance(last["content"], str):
        raise DataError(
            f"{where}: expected the last message's content to be text, got "
            f"{shortened(last['content'])}"
        )
    whole = _chat_text(tokenizer, turns, where)
    opening = _chat_text(tokenizer, turns[:-1], where, add_generation_prompt=True)
    if whole.startswith(opening):
        start = len(opening)
    else:
        # Some templates write more into the generation prompt than into a finished turn
        # (`<think>`): there the assistant's text itself marks where the completion begins.
        start = whole.rfind(last["content"].strip())
        if start < 0:
            raise DataError(
                f"{where}: the chat template rewrites the assistant's message "
                f"{shortened(last['content'])}, so that it cannot be told from the prompt; use "
                "prompt and completion templates"
            )
    answers = chat.accepted or (last["content"],)
    # Behind the end-of-turn token templates write a line break that the model never generates.
    return Row(whole[:start], whole[start:].rstrip(), _stripped(answers), templated=True)


def _continued_row(
    turns: Sequence[Message],
    completion: str,
    accepted: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> Row:
    """The prompt ends inside the assistant's turn; the completion goes on there, word for word."""
    prompt = _chat_text(tokenizer, turns, where, continue_final_message=True)
    answers = accepted or (completion,)
    return Row(prompt, completion, _stripped(answers), templated=True)


def _chat_text(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], where: str, **options: Any
) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: expected a tokenizer with a chat template to render messages, got one "
            "without; use prompt and completion templates, or a chat model"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, **options
        )
    except (jinja2.TemplateError, ValueError, TypeError) as failure:
        reason = " ".join(str(failure).split())[:160]
        raise DataError(f"{where}: the chat template refuses the messages ({reason})") from failure
    return str(text)


def _holds_messages(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _as_messages(value: Any, where: str) -> list[Message]:
    if not _holds_messages(value):
        raise DataError(
            f"{where}: expected a list of messages with role and content, got {shortened(value)}"
        )
    for turn in value:
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise DataError(
                f"{where}: expected every message to have role and content, got {shortened(turn)}"
            )
    return list(value)


def _stripped(answers: Sequence[str]) -> tuple[str, ...]:
    """Accepted answers without white space around them, each once."""
    return tuple(dict.fromkeys(answer.strip() for answer in answers))
