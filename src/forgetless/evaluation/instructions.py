"""Instruction-following probes: constraints that a program can check.

A row's prompt asks for something checkable ("Answer in all lowercase, in exactly three words.") and
its accepted answers name the constraints, as in IFEval (arXiv:2311.07911): `["lowercase",
"words:3"]`. The probe counts 1 where all of them hold.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence

from forgetless.errors import DataError

_TRAILING = " \t\n.!?\"'”’*"


def _words(text: str) -> int:
    return len(text.split())


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s+|$)", text) if part.strip()])


def _lines(text: str) -> int:
    return len([line for line in text.splitlines() if line.strip()])


def _bullets(text: str) -> int:
    return len(re.findall(r"^\s*[-*•]\s+\S", text, re.MULTILINE))


def _is_json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        json.loads(fenced.group(1) if fenced else text)
    except json.JSONDecodeError:
        return False
    return True


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()) is not None


# Every check gets the stripped text.
_PLAIN: dict[str, Callable[[str], bool]] = {
    "lowercase": lambda text: text == text.lower(),
    "uppercase": lambda text: text == text.upper() and text != text.lower(),
    "json": _is_json,
    "no_commas": lambda text: "," not in text,
    "quoted": lambda text: len(text) > 1 and text[0] == '"' and text[-1] == '"',
}
_COUNTS: dict[str, Callable[[str], int]] = {
    "words": _words,
    "sentences": _sentences,
    "lines": _lines,
    "bullets": _bullets,
}
_TEXTS: dict[str, Callable[[str, str], bool]] = {
    "starts_with": lambda text, value: text.lower().startswith(value.lower()),
    "ends_with": lambda text, value: (
        text.rstrip(_TRAILING).lower().endswith(value.rstrip(_TRAILING).lower())
    ),
    "includes": _has_word,
    "excludes": lambda text, value: not _has_word(text, value),
}
CONSTRAINTS = (
    *_PLAIN,
    *(f"{prefix}{name}:N" for name in _COUNTS for prefix in ("", "min_", "max_")),
    *(f"{name}:TEXT" for name in _TEXTS),
)


def parse_constraint(constraint: str) -> Callable[[str], bool]:
    """Turn `"lowercase"`, `"words:3"`, `"max_words:20"` or `"ends_with:done"` into a check.

    Raises:
        DataError: An unknown constraint, or a count that is not a number.
    """
    name, _, value = (part.strip() for part in constraint.partition(":"))
    if name in _PLAIN and not value:
        return _PLAIN[name]
    if name in _TEXTS and value:
        check = _TEXTS[name]
        return lambda text: check(text, value)
    bound, _, counted = name.rpartition("_")
    if counted in _COUNTS and bound in {"", "min", "max"}:
        if not value.isdecimal():
            raise DataError(
                f"instruction probe: expected a number in `{name}:N`, got {constraint!r}; "
                f"write for example `{name}:3`"
            )
        return _count_check(_COUNTS[counted], bound, int(value))
    near = difflib.get_close_matches(constraint, CONSTRAINTS, n=1, cutoff=0.3)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(CONSTRAINTS)}"
    raise DataError(f"instruction probe: expected a known constraint, got {constraint!r}; {hint}")


def _count_check(count: Callable[[str], int], bound: str, limit: int) -> Callable[[str], bool]:
    if bound == "min":
        return lambda text: count(text) >= limit
    if bound == "max":
        return lambda text: count(text) <= limit
    return lambda text: count(text) == limit


def follows_instructions(text: str, constraints: Sequence[str]) -> float:
    """1 where a text that is not empty keeps every constraint."""
    stripped = text.strip()
    return float(bool(stripped) and all(parse_constraint(c)(stripped) for c in constraints))
