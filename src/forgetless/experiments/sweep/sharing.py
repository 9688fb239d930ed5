"""What the runs of a sweep share, so that it is made once: moments, starts, the base's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.experiments.output import plain_recipe
from forgetless.experiments.regularised import calibrated_for
from forgetless.experiments.sweep.plan import PlannedRun
from forgetless.methods import make_any_method
from forgetless.methods.base import Method


@dataclass(frozen=True)
class Shared:
    """How many different things of each kind the runs need, and how many runs need one.

    Attributes:
        bases: Base models, each measured once.
        moments: Calibration passes: one for each base, its layers, and source of data.
        calibrated: Runs that need moments.
        starts: Solves for A0 and B0: one for each base, method with its options, and data.
        solved: Runs that start from a solve; plain LoRA only draws.
    """

    bases: int
    moments: int
    calibrated: int
    starts: int
    solved: int


def shared_by(runs: Sequence[PlannedRun]) -> Shared:
    """Count what runs share, by their recipes."""
    bases, moments, starts = set[str](), set[str](), set[str]()
    calibrated = solved = 0
    for run in runs:
        tree = plain_recipe(run.recipe)
        method = make_any_method(run.recipe.method)
        base = _base(tree)
        bases.add(repr(base))
        needed = sorted(method.needs | calibrated_for(run.recipe))
        calibrated += bool(needed)
        for role in needed:
            moments |= {repr([base, tree["targets"], s]) for s in tree[f"{role}_data"]}
        if isinstance(method, Method) and not method.draws:
            solved += 1
            data = {role: tree[f"{role}_data"] for role in sorted(method.reads)}
            weights = tree["calibration"]["source_weights"]
            starts.add(repr([base, tree["targets"], tree["method"], data, weights]))
    return Shared(len(bases), len(moments), calibrated, len(starts), solved)


def _base(tree: dict[str, Any]) -> list[Any]:
    return [tree[key] for key in ("model", "revision", "dtype", "quantization", "device")]
