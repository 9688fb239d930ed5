"""One regulariser, one file; `REGULARISERS` lists them, `make_regularisers` builds a recipe's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.errors import TrainingError
from forgetless.named import make_named
from forgetless.training.regularisers.base import Regulariser
from forgetless.training.regularisers.drift import Drift
from forgetless.training.regularisers.kl import KL
from forgetless.training.regularisers.penalty import Penalty
from forgetless.training.regularisers.project import Project
from forgetless.training.regularisers.replay import Replay

REGULARISERS: dict[str, type[Regulariser]] = {
    kind.name: kind for kind in (KL, Replay, Drift, Penalty, Project)
}

RegulariserInput = str | Mapping[str, Any] | Regulariser


def make_regularisers(given: Sequence[RegulariserInput]) -> tuple[Regulariser, ...]:
    """Build regularisers from names, or mappings of a name and options; each kind once.

    Raises:
        TrainingError: An unknown name or option, a value out of range, or a kind given twice.
    """
    made = tuple(
        one
        if isinstance(one, Regulariser)
        else make_named(one, REGULARISERS, what="regulariser", error=TrainingError)
        for one in given
    )
    names = [one.name for one in made]
    for name in names:
        if names.count(name) > 1:
            raise TrainingError(f"regulariser {name}: expected it once, got it twice; leave one")
    return made
