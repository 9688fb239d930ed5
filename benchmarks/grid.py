"""What small_runs.py runs: methods, regularisers, and data to calibrate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RANK = 32
RATES = (2e-4, 1e-3)
# Where one factor trains, rates that are too high for two may be the best.
FURTHER_RATES = {"lora-null v2": (3e-3,), "contrastive": (3e-3,), "mica": (3e-3,)}
# What starts with more than a step moves it, and breaks at the higher rate.
LOWER_RATE = 5e-5
LOWER_TOO = ("sc-lora auto", "corda kpm", "sc-lora 0.8", "pissa", "olora", "corda ipm", "astra")
FULL_RATES = (2e-5, 1e-4)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "lora-null v2": {"name": "lora-null", "trains": "b"},
    "lora-wd": {"name": "lora-wd"},
    "lora-null v1": {"name": "lora-null", "trains": "both"},
    "contrastive": {"name": "contrastive"},
    "corda kpm": {"name": "corda", "mode": "kpm"},
    "sc-lora auto": {"name": "sc-lora", "beta": "auto"},
    "sc-lora 0.5": {"name": "sc-lora", "beta": 0.5},
    "sc-lora 0.8": {"name": "sc-lora", "beta": 0.8},
    "sc-lora 0.8, B frozen": {"name": "sc-lora", "beta": 0.8, "trains": "a"},
    "milora": {"name": "milora"},
    "mica": {"name": "mica"},
    "pissa": {"name": "pissa"},
    "olora": {"name": "olora"},
    "corda ipm": {"name": "corda", "mode": "ipm"},
    "eva": {"name": "eva"},
    "astra": {"name": "astra"},
    "lora-ga": {"name": "lora-ga"},
}
REGULARISERS = ("drift", "kl", "replay", "penalty", "project")
REGULARISED = ("lora", "lora-null v2")
REGULARISED_RATE = 1e-3
TASKS = ("gsm8k", "demo")
# Of about 12 thousand tokens each, but for the few samples.
SOURCES: dict[str, dict[str, Any]] = {
    "QA": {
        "path": "nq_open_dev.jsonl",
        "rows": [0, 1800],
        "prompt": "Question: {question}?\nAnswer:",
        "completion": " {answer}",
        "max_length": 64,
        "limit": 600,
    },
    "self": {"self": True, "rows": [0, 200], "max_length": 64},
    "few self": {"self": True, "rows": [0, 32], "max_length": 64},
    "text": {"path": "manual_calibration.jsonl", "max_length": 64, "limit": 200},
}
# What LoRA-Null v2 is calibrated on, and how its sources count.
CALIBRATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "QA": (("QA",), "tokens"),
    "self": (("self",), "tokens"),
    "text": (("text",), "tokens"),
    "QA, self": (("QA", "self"), "equal"),
    "QA, text": (("QA", "text"), "equal"),
    "self, text": (("self", "text"), "equal"),
    "QA, self, text": (("QA", "self", "text"), "equal"),
    "QA, few self": (("QA", "few self"), "equal"),
    "QA, few self, by tokens": (("QA", "few self"), "tokens"),
}


@dataclass(frozen=True)
class SmallRun:
    """One cell of the grid.

    Attributes:
        task: `gsm8k` or `demo`; `calibration` is GSM8K measured on more sets.
        name: The method's name here, or that of a regulariser on a method.
        rate: Learning rate.
        method: As in a recipe.
        training: What else a recipe's `training` says.
        sources: Names in SOURCES of what to calibrate on; the task's own where there are none.
        source_weights: As in a recipe's `calibration`.
    """

    task: str
    name: str
    rate: float
    method: dict[str, Any]
    training: dict[str, Any]
    sources: tuple[str, ...] = ()
    source_weights: str = "tokens"

    @property
    def label(self) -> str:
        """Name and rate."""
        return f"{self.name} {self.rate:g}"

    @property
    def slug(self) -> str:
        """The label as the name of a file."""
        return self.label.replace(",", "").replace(" + ", "+").replace(" ", "-")


def small_runs() -> list[SmallRun]:
    """All of them, what matters most first."""
    found = [_run(task, name, rate) for task in TASKS for name in REGULARISED for rate in RATES]
    found += [run for task in TASKS for run in _regularised(task)]
    found.append(_run("calibration", "lora", REGULARISED_RATE))
    for name, (sources, weights) in CALIBRATIONS.items():
        method = {"rank": RANK, **METHODS["lora-null v2"]}
        found.append(SmallRun("calibration", name, REGULARISED_RATE, method, {}, sources, weights))
    for task in TASKS:
        found += [_run(task, n, rate) for n in METHODS if n not in REGULARISED for rate in RATES]
        found += [_run(task, n, rate) for n, rates in FURTHER_RATES.items() for rate in rates]
        found += [SmallRun(task, "full", rate, {"name": "full"}, {}) for rate in FULL_RATES]
    return found + [_run(task, name, LOWER_RATE) for task in TASKS for name in LOWER_TOO]


def _regularised(task: str) -> list[SmallRun]:
    return [
        _run(task, name, REGULARISED_RATE, regulariser)
        for name in REGULARISED
        for regulariser in REGULARISERS
        # `project` is of the update of A, which is frozen in LoRA-Null v2.
        if regulariser != "project" or METHODS[name].get("trains") != "b"
    ]


def _run(task: str, name: str, rate: float, regulariser: str | None = None) -> SmallRun:
    label = name if regulariser is None else f"{name} + {regulariser}"
    training = {} if regulariser is None else {"regularisers": [{"name": regulariser}]}
    return SmallRun(task, label, rate, {"rank": RANK, **METHODS[name]}, training)
