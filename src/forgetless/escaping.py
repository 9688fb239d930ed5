"""Text from data, models and users, made safe for a terminal, a page or a Markdown file."""

from __future__ import annotations

import re

# Control characters but \t and \n, what turns the direction of the text around it (a name could
# show as another one), and lone surrogates, which cannot be written as UTF-8.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\N{LEFT-TO-RIGHT EMBEDDING}-\N{RIGHT-TO-LEFT OVERRIDE}"
    "\N{LEFT-TO-RIGHT ISOLATE}-\N{POP DIRECTIONAL ISOLATE}\ud800-\udfff]"
)


def clean(text: str) -> str:
    """Text in which control, direction and surrogate characters are U+FFFD.

    Texts come from data and models; a raw escape character would reach the reader's terminal.
    """
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))


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
