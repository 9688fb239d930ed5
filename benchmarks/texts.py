"""General text that every machine with the demo's packages has: a manual, and a story.

The manual is Python's own language reference (`pydoc_data.topics`), the story `In the year 2889` by
Jules and Michel Verne, in the public domain, which comes with reasoning_gym.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

from forgetless.atomic import write_atomically

SHORTEST = 250  # characters of a passage


def write_texts(folder: Path) -> dict[str, Path]:
    """Write passages as JSONL; of the manual, no topic and no passage stands in both files."""
    names = sorted(topics)
    story = files("reasoning_gym").joinpath("data", "in_the_year_2889.txt").read_text("utf-8")
    body = story.split("*** START OF", 1)[1].split("*** END OF", 1)[0]
    held_out = [p for name in names[1::2] for p in _passages(topics[name])]
    parts = {
        "manual_calibration": [
            p for name in names[::2] for p in _passages(topics[name]) if p not in held_out
        ],
        "manual_evaluation": held_out,
        "story_evaluation": _passages(body),
    }
    return {
        name: write_atomically(
            folder / f"{name}.jsonl",
            "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in passages),
        )
        for name, passages in parts.items()
    }


def _passages(text: str) -> list[str]:
    """Paragraphs that are prose: not indented, and long enough; each once."""
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not p.startswith((" ", "*"))]
    joined = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return list(dict.fromkeys(p for p in joined if len(p) >= SHORTEST))
