"""A whole run, tiny: model folder, data files and recipe, for the tests of `run`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from forgetless.data.validation import validated
from forgetless.recipe import Recipe

_WORDS = (
    "apple",
    "fox",
    "dog",
    "lazy",
    "brown",
    "quick",
    "river",
    "stone",
    "Paris",
    "Rome",
    "tree",
)


def write_data(folder: Path, seed: int = 0) -> None:
    """Files of train, preserve and evaluation rows that share no row."""
    draw = random.Random(seed)
    seen: set[str] = set()

    def rows(count: int, start: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        while len(found) < count:
            question = " ".join(draw.choices(_WORDS, k=draw.randint(3, 7)))
            if question not in seen:
                seen.add(question)
                found.append({"question": f"{start} {question}?", "answer": draw.choice(_WORDS)})
        return found

    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 40), ("preserve", 24), ("gain", 6), ("retention", 6)):
        lines = (json.dumps(row) for row in rows(count, name))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def recipe_of(model: Path, data: Path, output: Path, **changes: object) -> Recipe:
    """30 steps, a checkpoint every 3; float32 on the CPU, so that runs repeat bit for bit."""
    templates = {"prompt": "Q: {question}\nA:", "completion": " {answer}", "max_length": 64}

    def named(name: str) -> dict[str, object]:
        return {"path": str(data / f"{name}.jsonl"), **templates}

    tree = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "method": {"name": "lora-null", "rank": 4},
        "train_data": named("train"),
        "preserve_data": [named("preserve")],
        "training": {
            "learning_rate": 5e-3,
            "max_steps": 30,
            "batch_size": 4,
            "save_steps": 3,
            "logging_steps": 2,
            "validation_rows": 4,
        },
        "evaluation": {
            "gain": [{"name": "task", "metrics": ["nll", "exact_match"], **named("gain")}],
            "retention": [{"name": "facts", **named("retention")}],
            "scales": [0.5],
            "samples": 1,
        },
        "output": str(output),
        **changes,
    }
    return validated(Recipe, tree)
