"""A judge of the user's own: any function that reads prompts, answers and references.

It is called once for the base's answers and once for the tuned model's, and not told which is
which. Recipes hold data and no code, so that a judge is given in Python only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from forgetless.data.validation import shortened
from forgetless.errors import DataError, RecipeError
from forgetless.escaping import one_line
from forgetless.evaluation.items import TASK_SHARES, Metric

_NAME = re.compile(r"[A-Za-z0-9][\w .-]{0,39}")


class Judge(Protocol):
    """Scores answers; more is better."""

    def __call__(
        self, prompts: list[str], answers: list[str], references: list[str], /
    ) -> Sequence[float]:
        """Score each answer.

        Args:
            prompts: Prompts as the model read them, its chat template included.
            answers: What was generated.
            references: The first accepted answer of each row.

        Returns:
            One finite number an answer.
        """
        ...


def check_judges(judges: Mapping[str, Judge]) -> None:
    """Refuse what is no judge, and names that mean something else.

    Raises:
        RecipeError: No mapping; a name of a metric, or one that a table cannot show; a value not to
            be called.
    """
    if not isinstance(judges, Mapping):
        raise RecipeError(
            f'judges: expected functions by name, {{"name": function}}, got {_shown(judges)}'
        )
    for name, judge in judges.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RecipeError(
                f"judges: expected names of up to 40 letters, digits, spaces and ._-, got "
                f"{_shown(name)}; rename it"
            )
        if name in get_args(Metric) or name in TASK_SHARES:
            raise RecipeError(f"judges: expected another name than a metric's, got {name!r}")
        if not callable(judge):
            raise RecipeError(
                f"judges.{name}: expected a function of prompts, answers and references, got "
                f"{_shown(judge)}"
            )


def judge_answers(
    name: str,
    judge: Judge,
    where: str,
    prompts: Sequence[str],
    answers: Sequence[str],
    references: Sequence[str],
) -> NDArray[np.float64]:
    """What a judge says of the answers of one model.

    Raises:
        DataError: It gives another number of figures than there are answers, or one that is no
            finite number.
    """
    given = judge(list(prompts), list(answers), list(references))
    said = f"{where}: judge {name!r}: expected"
    no_list = DataError(f"{said} a list of {len(answers)} numbers, got {_shown(given)}")
    if isinstance(given, str | Mapping | Set):  # a set has no order
        raise no_list
    try:
        each = iter(given)
    except TypeError:  # an array or tensor of no dimension has `__iter__`, too
        raise no_list from None
    values = list(each)
    if len(values) != len(answers):
        raise DataError(
            f"{said} one number for each of {len(answers)} answers, got {len(values)}; return one "
            "for every answer, in their order"
        )
    figures: list[float] = []
    for row, value in enumerate(values):
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            figures.append(float(value))
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{said} numbers, got {_shown(value)} for answer {row}") from None
        if not np.isfinite(figures[-1]):
            raise DataError(
                f"{said} finite numbers, got {figures[-1]} for answer {row}; return a number where "
                "it cannot tell, too"
            )
    return np.array(figures, np.float64)


def _shown(value: object) -> str:
    return one_line(shortened(value))
