"""Comparing methods over learning rates and seeds, from the records of their runs.

from forgetless.experiments.compare import compare

print(compare(records).title)
"""

from __future__ import annotations

from forgetless.experiments.compare.compare import compare, is_worth_comparing
from forgetless.experiments.compare.results import ArmResult, Comparison

__all__ = ["ArmResult", "Comparison", "compare", "is_worth_comparing"]
