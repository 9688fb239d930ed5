"""Rendered rows: what a data spec's templates make of a source record, before tokenisation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from forgetless.data.spec import DataSpec


@dataclass(frozen=True)
class Row:
    """One rendered example.

    Attributes:
        prompt: Text before the completion; empty for plain text.
        completion: The text to learn or to keep; the whole text for a plain row.
        answers: All accepted answers, for exact match and F1; the stripped completion where the
            record has no list-valued field.
        templated: Whether a chat template has written the special tokens already, so that the
            tokenizer must add none.
        further: What the spec's `further` templates give for the record.
    """

    prompt: str
    completion: str
    answers: tuple[str, ...] = ()
    templated: bool = False
    further: tuple[str, ...] = ()

    @property
    def has_completion(self) -> bool:
        """Whether anything but white space, and what a chat template writes, follows the prompt."""
        if self.templated and not any(self.answers):
            return False
        return bool(self.completion.strip())

    @property
    def text(self) -> str:
        """Prompt and completion as the model reads them."""
        return self.prompt + self.completion

    @property
    def digest(self) -> str:
        """Hex sha256 of the rendered text, runs of white space taken as one and none at the ends.

        For finding equal rows; what depends on every character takes the set's `fingerprint`.
        """
        return hashlib.sha256(" ".join(self.text.split()).encode()).hexdigest()


@dataclass(frozen=True)
class RowSet:
    """The rows of one data spec, in order."""

    spec: DataSpec
    rows: tuple[Row, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of every rendered row and of what tokenisation depends on."""
        return fingerprint_rows(self.rows, self.spec)


def fingerprint_rows(rows: Iterable[Row], spec: DataSpec) -> str:
    """Hash rows and accepted answers with the spec's `max_length` and `tokens`; 16 hex digits."""
    state = hashlib.sha256(f"{spec.max_length} {spec.tokens}".encode())
    for row in rows:
        state.update(f"\0{len(row.prompt)} {row.templated}\0{row.text}".encode())
        state.update("".join(f"\0{answer}" for answer in row.answers).encode())
    return state.hexdigest()[:16]
