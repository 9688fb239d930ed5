"""Test results → docs/compatibility.md: `python -m compatibility.page RESULTS PAGE`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compatibility.cells import KEYS, Observation, Results, worst
from forgetless.escaping import markdown_text

MARKS = {
    "pass": "✓",
    "refused": "refused",
    "skipped": "skipped",
    "expected failure": "known to fail",
    "fail": "✗ fails",
}
TITLES = {
    "base": "architecture",
    "form": "form",
    "quantization": "quantised base",
    "trainer": "trainer",
    "start": "start",
    "feature": "with",
    "export": "export",
}
# How a value is written on the page, where that is not how it is written in the tests.
NAMES: dict[str, dict[str, str]] = {
    "base": {
        "llama": "Llama",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "mistral": "Mistral",
        "gemma3": "Gemma 3 (text)",
        "phi": "Phi",
        "phi3": "Phi-3",
        "gpt2": "GPT-2",
        "gpt_neox": "GPT-NeoX",
        "mixtral": "Mixtral",
        "qwen3_moe": "Qwen3-MoE",
        "qwen2_moe": "Qwen2-MoE",
        "t5": "T5 (v1.0)",
        "t5_gated": "T5 (v1.1, gated)",
        "bart": "BART",
    },
    "trainer": {
        "plain": "transformers Trainer",
        "seq2seq": "transformers Seq2SeqTrainer",
        "sft": "TRL SFTTrainer",
        "dpo": "TRL DPOTrainer",
        "loop": "hand-written loop",
    },
}


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the page: which keys name its rows, and which its columns.

    A cell stands in it where it has all of them. `quantization` and `feature` change what a cell
    means: cells that have one stand only in tables that show it.
    """

    title: str
    rows: tuple[str, ...]
    column: str
    note: str = ""

    def shows(self, keys: Mapping[str, str]) -> bool:
        """Whether a cell stands here."""
        own = {*self.rows, self.column}
        return own <= keys.keys() and not ({"quantization", "feature"} & keys.keys()) - own

    def place(self, keys: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
        """Row and column of a cell, as they are written."""
        return tuple(shown(key, keys[key]) for key in self.rows), shown(
            self.column, keys[self.column]
        )


TABLES = (
    Table(
        "Architecture and export",
        ("base",),
        "export",
        "Attached with every form, trained, exported, reloaded and compared.",
    ),
    Table(
        "Architecture and trainer",
        ("base",),
        "trainer",
        "From a start to a reloaded export. TRL's trainers are for causal language models only.",
    ),
    Table("Architecture and measurement", ("base",), "feature"),
    Table("Trainer, form and way in", ("trainer", "form"), "start"),
    Table("What else a trainer does", ("trainer", "feature"), "start"),
    Table("LoRA of other origin and export", ("feature",), "export"),
    Table("Quantised base and architecture", ("quantization",), "base"),
    Table("Quantised base and form", ("quantization",), "form"),
    Table("Quantised base and trainer", ("quantization",), "trainer"),
    Table("Quantised base and export", ("quantization",), "export"),
    Table("Quantised base and what else", ("quantization",), "feature"),
)


def shown(key: str, value: str) -> str:
    """A value as the page writes it."""
    return NAMES.get(key, {}).get(value, value)


def render(results: Results) -> str:
    """The whole page."""
    parts = [_head(results)]
    parts += [text for table in TABLES if (text := _table(table, results.observations))]
    parts += [_origin(results)]
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    outcomes = Counter(one.outcome for one in results.observations)
    counts = ", ".join(f"{outcomes[name]} {name}" for name in MARKS if outcomes[name])
    return "\n".join(
        [
            "# Compatibility",
            "",
            "Written by `make compatibility` from test results; do not edit.",
            "",
            f"Made with {versions}; results: {counts}.",
            "",
            "✓ every test of the cell passes. **refused**: an error says what to do instead, and a",
            "test sees that it does. **skipped**: not run here. **known to fail**, **✗ fails**: as",
            "the words say. Empty: no test. Where several tests stand for one cell, the worst",
            "outcome is shown. Models are tiny random ones (2 layers, width 32, float32, CPU)",
            "where nothing else is said: [architectures](architectures.md). Export targets are",
            "engines' rules, reloaded with PEFT or transformers: [serving](serving.md).",
            "llama.cpp's ✓ means written, and read back by forgetless. The engine itself is run by",
            "tests/integration/test_llama_cpp.py, where it is installed; in CI it is not: what it",
            "showed, and with which version, stands in [serving](serving.md#llamacpp).",
        ]
    )


def _table(table: Table, observations: Sequence[Observation]) -> str:
    """Empty where there is no cell of it."""
    cells: dict[tuple[tuple[str, ...], str], list[Observation]] = {}
    for one in observations:
        if table.shows(one.keys):
            cells.setdefault(table.place(one.keys), []).append(one)
    if not cells:
        return ""
    first = list(dict.fromkeys(row[0] for row, _ in cells))
    rows = sorted(dict.fromkeys(row for row, _ in cells), key=lambda row: first.index(row[0]))
    columns = list(dict.fromkeys(column for _, column in cells))
    notes: list[str] = []
    lines = [[*(TITLES[key] for key in table.rows), *columns]]
    for row in rows:
        marks = [_mark(table, cells.get((row, column), []), notes) for column in columns]
        lines.append([*row, *marks])
    rule = ["---"] * len(table.rows) + [":---:"] * len(columns)
    text = [_line(lines[0]), f"| {' | '.join(rule)} |", *map(_line, lines[1:])]
    parts = [f"## {table.title}", *([table.note] if table.note else []), "\n".join(text)]
    if notes:
        parts.append("\n".join(f"{n}. {markdown_text(note)}" for n, note in enumerate(notes, 1)))
    return "\n\n".join(parts)


def _mark(table: Table, observations: Sequence[Observation], notes: list[str]) -> str:
    """The worst outcome, with the number of the note that gives its reason."""
    if not observations:
        return ""
    one = worst(observations)
    mark = MARKS[one.outcome]
    if not one.reason:
        return mark
    others = {key: one.keys[key] for key in KEYS if key in one.keys}
    own = {*table.rows, table.column}
    alike = {tuple(o.keys.items()) for o in observations if o.outcome == one.outcome}
    told = [f"{TITLES[k]} {shown(k, v)}" for k, v in others.items() if k not in own]
    # Which of the cell's tests, where not all of them ended so.
    where = f"{', '.join(told)}: " if told and len(alike) < _variety(observations) else ""
    note = f"{where}{one.reason}"
    if note not in notes:
        notes.append(note)
    return f"{mark} ({notes.index(note) + 1})"


def _variety(observations: Sequence[Observation]) -> int:
    return len({tuple(one.keys.items()) for one in observations})


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(markdown_text(cell) for cell in cells)} |"


def _origin(results: Results) -> str:
    """Which tests the page stands on."""
    cases: dict[str, list[Observation]] = {}
    for one in results.observations:
        cases.setdefault(one.test, []).append(one)
    lines = ["| test | cells |", "| --- | ---: |"]
    lines += [f"| `{test}` | {len(found)} |" for test, found in sorted(cases.items())]
    text = "## Tests\n\n" + "\n".join(lines)
    if results.not_collected:
        missing = "\n".join(
            f"- `{path}`: {markdown_text(why)}"
            for path, why in sorted(results.not_collected.items())
        )
        text += f"\n\nNot run at all here:\n\n{missing}"
    return text


def main(results: str, page: str) -> int:
    """Write the page; 1 where a cell fails."""
    found = Results.load(Path(results))
    Path(page).write_text(render(found))
    failed = sorted({one.test for one in found.observations if one.outcome == "fail"})
    for test in failed:
        sys.stderr.write(f"{page}: shows a failure of {test}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
