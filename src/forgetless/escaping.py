"""Text from data, models and users, made safe for a terminal, a page or a Markdown file."""

from __future__ import annotations

import re


def clean(text: str) -> str:
    """Text without what no screen shows: control characters and lone surrogates become U+FFFD.

    Texts come from data and models; a raw escape character would reach the reader's terminal, and a
    lone surrogate cannot be written as UTF-8.
    """
    return "".join(
        c
        if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000)
        else "\N{REPLACEMENT CHARACTER}"
        for c in text.replace("\r\n", "\n").replace("\r", "\n")
    )


def one_line(text: str) -> str:
    """Cleaned text with every run of white space as one space."""
    return " ".join(clean(text).split())


def markdown_text(text: str) -> str:
    """One line that stays what it is in Markdown: no column, emphasis, tag, link or image."""
    # An underscore inside a word is no emphasis.
    escaped = re.sub(r"([\\|`*~\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def markdown_code(text: str, language: str = "") -> str:
    """A fenced block that nothing in the text can end."""
    text = clean(text).rstrip("\n")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
