"""Sweeps: many runs of one base recipe, side by side, each done once.

from forgetless.experiments.sweep import load_sweep, sweep

status = sweep(load_sweep("sweep.yaml"))
"""

from __future__ import annotations

from forgetless.experiments.sweep.drive import (
    RunStatus,
    SweepProgress,
    SweepStatus,
    look_at,
    sweep,
)
from forgetless.experiments.sweep.plan import Plan, PlannedRun, plan_sweep
from forgetless.experiments.sweep.spec import SweepSpec, load_sweep

__all__ = [
    "Plan",
    "PlannedRun",
    "RunStatus",
    "SweepProgress",
    "SweepSpec",
    "SweepStatus",
    "load_sweep",
    "look_at",
    "plan_sweep",
    "sweep",
]
