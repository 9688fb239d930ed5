"""The import graph of the package, read from its source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "forgetless"
LIBRARY = {
    "linalg",
    "methods",
    "models",
    "data",
    "calibration",
    "adapters",
    "evaluation",
    "training",
}
# Part → what it may import beside itself, `errors`, `atomic`, `escaping` and
# `named`; a dotted entry is one module.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "atomic": set(),
    "escaping": set(),
    "named": set(),
    "launcher": set(),
    "processes": {"launcher"},
    "linalg": set(),
    "methods": {"linalg"},
    "models": {"processes"},
    "data": {"models"},
    "calibration": {"linalg", "models", "data", "processes"},
    "adapters": {"linalg", "methods", "models", "data", "calibration", "processes"},
    "evaluation": {"linalg", "models", "data", "calibration", "adapters"},
    "training": LIBRARY | {"processes"},
    # A recipe is read without loading anything: what parses data specs and items, and no more.
    "recipe": {
        "data.spec",
        "data.validation",
        "evaluation.items",
        "evaluation.lm_eval.spec",
        "evaluation.parse",
        "methods",
        "training.options",
        "training.regularisers",
        "recipe_yaml",
    },
    "recipe_yaml": {"data.validation"},
    "experiments": LIBRARY | {"recipe", "recipe_yaml", "processes"},
    "console": {"experiments"},
    "cli": LIBRARY | {"recipe", "experiments", "console", "launcher", "processes", "__init__"},
    "__main__": {"cli"},
    "__init__": LIBRARY | {"recipe", "experiments"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it out"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def allowed(part: str, name: str) -> bool:
    """Whether `part` may import `name`, the dotted name after `forgetless.`."""
    target = name.split(".")[0]
    if target in {part, "errors", "atomic", "escaping", "named"} or name == "__version__":
        return True
    if target not in ALLOWED:  # a name that __init__ exports: `from forgetless import attach`
        return "__init__" in ALLOWED[part]
    return any(name == entry or name.startswith(f"{entry}.") for entry in ALLOWED[part])


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_its_part_may(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} has no place in the import graph yet: add it to ALLOWED"
    for line, name in imported(path):
        head, _, rest = name.partition(".")
        if head == "forgetless" and rest:
            assert allowed(part, rest), f"{path.name}:{line}: {part} must not import {name}"


def test_linalg_needs_torch_alone() -> None:
    for path in (PACKAGE / "linalg").rglob("*.py"):
        for line, name in imported(path):
            head = name.split(".")[0]
            known = head in {"torch", "forgetless"} or head in sys.stdlib_module_names
            assert known, f"{path.name}:{line}: linalg must not import {name}"


def test_the_graph_has_no_cycle() -> None:
    order: list[str] = []
    waiting = {
        part: {entry.split(".")[0] for entry in may} - {part} for part, may in ALLOWED.items()
    }
    while waiting:
        ready = [part for part, needs in waiting.items() if needs <= set(order)]
        assert ready, f"cycle among {sorted(waiting)}"
        order += ready
        for part in ready:
            del waiting[part]


@pytest.mark.parametrize(
    ("part", "name", "expected"),
    [
        ("linalg", "methods.lora", False),
        ("linalg", "errors.CalibrationError", True),
        ("recipe", "data.spec.DataSpec", True),
        ("recipe", "data.specimen", False),
        ("data", "calibration.engine", False),
        ("evaluation", "training.sft", False),
        ("cli", "attach", True),
        ("training", "attach", False),
    ],
)
def test_the_rule_itself(part: str, name: str, expected: bool) -> None:
    assert allowed(part, name) is expected
