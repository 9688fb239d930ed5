"""What the benchmarks share: the model and text they run on, interleaved timing, stored results.

A result goes to benchmarks/results/bench/<name>.json with hardware and versions. Clock times of two
machines, or of two days, say little: each table holds ratios of what ran in one process, and is
compared with the last stored run by those.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from forgetless.data.tokens import Batch, TokenRow, make_batches, pad_token_id
from forgetless.models.hardware import describe_hardware
from forgetless.models.load import LoadedModel, load_model

STORE = Path(__file__).parent / "results" / "bench"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


def loaded_demo(dtype: str) -> LoadedModel:
    """SmolLM2-135M-Instruct."""
    return load_model("demo", dtype=dtype)


def demo_batches(
    tokenizer: Any, *, rows: int, length: int, batch_size: int, skip: int = 0
) -> list[Batch]:
    """Windows of Python's language reference without padding, `skip` tokens in."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, verbose=False)["input_ids"][skip:]
    windows = [TokenRow(tuple(ids[i * length : (i + 1) * length]), 0) for i in range(rows)]
    return list(make_batches(windows, batch_size=batch_size, pad_token_id=pad_token_id(tokenizer)))


def interleaved(
    ways: Mapping[str, Callable[[], object]], repetitions: int = 5
) -> dict[str, list[float]]:
    """Seconds of each way, one after the other, so that a slow minute hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repetition in range(repetitions + 1):  # the first one warms up
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            gc.collect()
            begun = time.perf_counter()
            ways[name]()
            if repetition:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(seconds: Mapping[str, list[float]], what: str, reference: str) -> dict[str, float]:
    """Medians, and the median of the ratios of each repetition with the extremes."""
    ratios = [a / b for a, b in zip(seconds[what], seconds[reference], strict=True)]
    return {
        "seconds": statistics.median(seconds[what]),
        "reference_seconds": statistics.median(seconds[reference]),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


class Bench:
    """One table: printed row by row, stored at the end, beside what was stored before."""

    def __init__(self, name: str, title: str) -> None:
        self._path = STORE / f"{name}.json"
        self._rows: dict[str, dict[str, float]] = {}
        self._title = title
        self._before: dict[str, Any] = {}
        if self._path.exists():
            self._before = json.loads(self._path.read_text())
        print(f"\n{title}")

    def add(self, what: str, **figures: float) -> None:
        """A row; a `ratio` is shown beside its `goal` and the stored one."""
        self._rows[what] = figures
        shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        before = self._before.get("rows", {}).get(what, {})
        key = "ratio" if "ratio" in figures else next(iter(figures))
        if key in before:
            shown += f"; before: {key} {before[key]:.3g}"
        if "ratio" in figures and "goal" in figures:
            shown += "" if figures["ratio"] <= figures["goal"] else "  ABOVE THE GOAL"
        print(f"  {what}: {shown}", flush=True)

    def finish(self) -> None:
        """Store the table, unless FORGETLESS_BENCH_KEEP says to leave what is stored."""
        if os.environ.get("FORGETLESS_BENCH_KEEP"):
            return
        stored = {
            "title": self._title,
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": describe_hardware(),
            "versions": dict(_versions()),
            "rows": self._rows,
        }
        STORE.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"  stored: {self._path.name}")


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # a machine lent for a benchmark may lack some
            yield name, version(name)
