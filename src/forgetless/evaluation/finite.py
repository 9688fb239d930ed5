"""Refuse figures that a mean would hide, or that a record could not hold: they read as missing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forgetless.errors import AdapterError


def check_finite(by_row: NDArray[np.float64], figure: str, name: str, which: str) -> None:
    """Check one model's figures of one item.

    Args:
        by_row: The figures.
        figure: What they are.
        name: The item's name.
        which: `base model` or `tuned model`.

    Raises:
        AdapterError: A figure that is NaN or infinite, with its row.
    """
    bad = np.flatnonzero(~np.isfinite(by_row))
    if len(bad):
        remedy = (
            "load it in float32 or bfloat16"
            if which == "base model"
            else "what was tuned has diverged; train with a lower learning rate"
        )
        raise AdapterError(
            f"evaluation item `{name}`: expected a finite {figure} from the {which}, got "
            f"{by_row[bad[0]]} at row {bad[0]}; {remedy}"
        )
