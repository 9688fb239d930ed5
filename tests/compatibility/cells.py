"""A cell of the compatibility page: which keys it has, and what the tests of it showed.

    @pytest.mark.compatibility(base="{name}", export="peft")

marks a test as one that shows a cell; every key is optional, `{name}` is a parameter of the test,
and `{options[rank]}` a part of one. `refused="reason"` says that the test shows a documented
refusal; `refuse(request, error)` says so from inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

# What a cell is about: architecture, how the adapter is held, how the base is stored, who trains,
# `attach` or `initialize`, what else is switched on or asked for, and what is written.
KEYS = ("base", "form", "quantization", "trainer", "start", "feature", "export")
# Of several tests for one cell the worst outcome is shown: the last of these.
OUTCOMES = ("pass", "refused", "skipped", "expected failure", "fail")
REFUSED = "compatibility-refused"


@dataclass(frozen=True, slots=True)
class Observation:
    """What one test showed of one cell.

    Attributes:
        test: Its id, without the parameters.
        keys: Which cell; a subset of `KEYS`.
        outcome: One of `OUTCOMES`.
        reason: Why it is no pass.
    """

    test: str
    keys: Mapping[str, str]
    outcome: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Results:
    """One session.

    Attributes:
        versions: Of Python and of the libraries.
        observations: In the order in which the tests ran.
        not_collected: Test files that this environment skips as a whole, and why.
    """

    versions: Mapping[str, str]
    observations: tuple[Observation, ...]
    not_collected: Mapping[str, str]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        values = json.loads(path.read_text())
        found = tuple(Observation(**one) for one in values["observations"])
        return cls(values["versions"], found, values["not_collected"])


def marked_cells(item: pytest.Item) -> list[tuple[dict[str, str], str]]:
    """Keys of every cell that a test is marked for, its parameters filled in; and its refusal."""
    parameters: Mapping[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    cells = []
    for marker in item.iter_markers("compatibility"):
        unknown = marker.kwargs.keys() - {*KEYS, "refused"}
        if unknown or marker.args:
            raise pytest.UsageError(
                f"{item.nodeid}: compatibility: expected the keys {', '.join(KEYS)}, got "
                f"{', '.join([*sorted(unknown), *map(repr, marker.args)])}"
            )
        filled = {k: str(v).format_map(parameters) for k, v in marker.kwargs.items()}
        refused = filled.pop("refused", "")
        if filled.get("quantization") == "none":
            del filled["quantization"]
        cells.append((filled, refused))
    return cells


def refuse(request: pytest.FixtureRequest, reason: BaseException | str) -> None:
    """Note that what the running test shows is a refusal with a remedy."""
    request.node.user_properties.append((REFUSED, str(reason)))


def worst(observations: Iterable[Observation]) -> Observation:
    """The one whose outcome is shown; the first of several."""
    return max(observations, key=lambda one: OUTCOMES.index(one.outcome))
