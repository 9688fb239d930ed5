"""What a sweep will cost: from its finished runs where there are any, else in steps and tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean

from forgetless.data.loading import check_rows
from forgetless.experiments.prepare import training_options
from forgetless.experiments.sweep.drive import RunStatus, SweepStatus
from forgetless.methods import make_any_method
from forgetless.recipe import Recipe


@dataclass(frozen=True)
class Cost:
    """What is left to do.

    Attributes:
        runs: How many.
        steps: Optimiser steps of all of them; None where rows cannot be counted before the model is
            loaded (chat messages, the hub).
        tokens: Train tokens at most, every row at its `max_length`.
        seconds: Of the clock, as many at a time as the sweep takes; None where nothing tells.
        source: Where `seconds` comes from, in words.
    """

    runs: int
    steps: int | None
    tokens: int | None
    seconds: float | None
    source: str


def cost_of(status: SweepStatus) -> Cost:
    """What the runs that are not done will cost."""
    left = [one for one in status.runs if one.state != "done"]
    counted = _Rows()
    steps = [counted.steps(one.run.recipe) for one in left]
    tokens = [counted.tokens(one.run.recipe) for one in left]
    return Cost(
        len(left),
        steps=sum(s for s in steps if s is not None) if None not in steps else None,
        tokens=sum(t for t in tokens if t is not None) if None not in tokens else None,
        seconds=seconds_left(status),
        source=_source(status),
    )


def seconds_left(status: SweepStatus) -> float | None:
    """Of the clock, until all runs are done; None before the first one is."""
    done = [one for one in status.runs if one.state == "done"]
    if not done:
        return None
    usual = _Usual(done)
    left = [
        max(usual.seconds(one.run.recipe) - _seconds_since(one), 0.0)
        for one in status.runs
        if one.state in ("waiting", "running", "failed")
    ]
    # No run is shorter for there being many at a time.
    return max(sum(left) / status.slots, max(left, default=0.0))


class _Usual:
    """Mean seconds of finished runs: of the same method where there are any, else of all."""

    def __init__(self, done: Sequence[RunStatus]) -> None:
        self._by_method: dict[str, list[float]] = defaultdict(list)
        for one in done:
            self._by_method[str(one.run.recipe.method["name"])].append(one.seconds)
        self._all = mean(one.seconds for one in done)

    def seconds(self, recipe: Recipe) -> float:
        found = self._by_method.get(str(recipe.method["name"]))
        return mean(found) if found else self._all


def _source(status: SweepStatus) -> str:
    done = [one for one in status.runs if one.state == "done"]
    if not done:
        return "no run of this sweep is finished yet: the first will tell how long one takes"
    runs = "1 finished run" if len(done) == 1 else f"{len(done)} finished runs"
    return (
        f"by the {runs} of this sweep, which also paid for what the others share (moments, starts, "
        "the base's figures)"
    )


def _seconds_since(one: RunStatus) -> float:
    since = one.progress.get("since")
    if one.state != "running" or not isinstance(since, str):
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()


class _Rows:
    """Counts the train rows of recipes, each source once."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def steps(self, recipe: Recipe) -> int | None:
        """Optimiser steps of a run."""
        options = training_options(recipe, make_any_method(recipe.method))
        if options.max_steps is not None:
            return options.max_steps
        rows = sum(self._of(recipe)) - recipe.training.validation_rows
        return options.num_steps(rows) if rows > 0 and all(self._of(recipe)) else None

    def tokens(self, recipe: Recipe) -> int | None:
        """Train tokens of a run, at most."""
        steps, training = self.steps(recipe), recipe.training
        if steps is None:
            return None
        longest = max(spec.max_length for spec in recipe.train_data)
        return steps * training.batch_size * training.gradient_accumulation * longest

    def _of(self, recipe: Recipe) -> list[int]:
        """Rows of each source; 0 for what can only be counted with a model at hand."""
        counts = []
        for spec in recipe.train_data:
            key = repr(spec)
            if key not in self._found:
                self._found[key] = len(check_rows(spec, needs_completion=True).rows)
            counts.append(self._found[key])
        return counts
