"""Samples of all runs: the same prompt of the same item brought together, its markup set apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from forgetless.evaluation.results import Side
from forgetless.experiments.runs import Run

# Special tokens of the usual chat templates; the role stands behind ChatML's own.
_MARKUP = re.compile(
    r"<\|im_start\|>(?:system|user|assistant)?\n?|<\|[^|<>\n]{1,40}\|>\n?"
    r"|<(?:start|end)_of_turn>(?:user|model)?\n?|\[/?INST\]|</?s>"
)


@dataclass(frozen=True)
class Answer:
    """What one model said; `run` is None for a base, `right` where no metric judged it."""

    name: str
    run: Run | None
    text: str
    right: bool | None


@dataclass(frozen=True)
class Exchange:
    """One prompt of one item, and what the base and every run that saw it answered.

    `parts` is the prompt in pieces, each with whether it is markup or what every prompt begins
    with.
    """

    item: str
    side: Side
    parts: tuple[tuple[str, bool], ...]
    reference: str
    answers: tuple[Answer, ...]


def exchanges(runs: Sequence[Run]) -> list[Exchange]:
    """Samples of all runs by prompt: what was to be learned first, what most runs saw first."""
    found: dict[tuple[str, Side, str, str], list[Answer]] = {}
    for run in runs:
        for item in run.record.evaluation.items:
            for sample in item.samples:
                key = (item.name, item.side, sample.prompt, sample.reference)
                answers = found.setdefault(key, [])
                bases = [answer.text for answer in answers if answer.run is None]
                if not bases:
                    answers.append(Answer("base", None, sample.base, sample.base_right))
                elif sample.base not in bases:
                    name = f"base of {run.name}"
                    answers.append(Answer(name, None, sample.base, sample.base_right))
                answers.append(Answer(run.name, run, sample.tuned, sample.tuned_right))
    items = list(dict.fromkeys(key[0] for key in found))
    order = sorted(
        found.items(), key=lambda p: (p[0][1] != "gain", items.index(p[0][0]), -len(p[1]))
    )
    shared = _shared_start([prompt for _, _, prompt, _ in found])
    return [
        Exchange(item, side, _parts(prompt, shared), reference, tuple(answers))
        for (item, side, prompt, reference), answers in order
    ]


def _shared_start(prompts: Sequence[str]) -> int:
    """Length of the lines that all prompts begin with: the system prompt, the user's opening."""
    if len(set(prompts)) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    pairs = enumerate(zip(first, last, strict=False))
    length = next((place for place, (a, b) in pairs if a != b), min(len(first), len(last)))
    return first.rfind("\n", 0, length) + 1


def _parts(prompt: str, shared: int) -> tuple[tuple[str, bool], ...]:
    parts: list[tuple[str, bool]] = []
    if shared:
        # On one line, so that what is the same everywhere takes no room.
        parts.append((" ".join(prompt[:shared].split()) + "\n", True))
    rest, place = prompt[shared:], 0
    for found in _MARKUP.finditer(rest):
        if found.start() > place:
            parts.append((rest[place : found.start()], False))
        parts.append((found.group(), True))
        place = found.end()
    if place < len(rest):
        parts.append((rest[place:], False))
    return tuple(parts)
