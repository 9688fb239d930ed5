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
