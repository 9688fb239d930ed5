"""Comparing methods over learning rates and seeds, from the records of their runs.

from forgetless.experiments.compare import compare

print(compare(records).title)
"""

from __future__ import annotations

from forgetless.experiments.compare.arms import has_several_runs
from forgetless.experiments.compare.compare import compare
from forgetless.experiments.compare.results import ArmResult, Comparison
from forgetless.experiments.compare.tables import as_csv, flat_rows, markdown

__all__ = [
    "ArmResult",
    "Comparison",
    "as_csv",
    "compare",
    "flat_rows",
    "has_several_runs",
    "markdown",
]
