"""Small runs of everything that forgetless compares, on two tasks; figures as files.

    python benchmarks/small_runs.py DATA WORK [--only TASK/NAME ...] [--list]

DATA holds gsm8k_train.jsonl, gsm8k_test.jsonl, nq_open_dev.jsonl and webquestions_train.jsonl; run
folders go under WORK. Figures of each run, without rows of data, go to results/small_runs, and a
run whose file is there is skipped: stop it whenever you like and run it again. Several may run side
by side; each takes what no other is at. What each costs is told in seconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from grid import SOURCES, SmallRun, small_runs
from texts import write_texts

from forgetless.atomic import write_atomically
from forgetless.console import TerminalProgress
from forgetless.data.demo import demo_specs
from forgetless.errors import ForgetlessError
from forgetless.evaluation.results import EvaluationReport
from forgetless.experiments.record import Record, load_record
from forgetless.experiments.run import run
from forgetless.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "small_runs"
GSM8K = HERE.parent / "recipes" / "gsm8k.yaml"
RECIPES = {"gsm8k": GSM8K, "calibration": GSM8K, "demo": HERE / "demo_task.yaml"}
# Rows of each evaluation item: two cores measure for longer than they train.
ROWS = {
    "GSM8K": 60,
    "family relationships": 80,
    "NQ-open": 100,
    "WebQuestions": 100,
    "own text": 50,
    "world facts": 60,
    "manual": 50,
    "story": 50,
}
FACTS = {"path": "evaluation_facts.jsonl", "metrics": ["kl", "nll", "greedy_match"]}
# Retention items beyond those of the task's recipe.
FURTHER: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"name": "world facts", **FACTS}],
    "calibration": [
        {"name": "world facts", **FACTS},
        {"name": "manual", "path": "manual_evaluation.jsonl", "max_length": 64},
        {"name": "story", "path": "story_evaluation.jsonl", "max_length": 64},
    ],
    "demo": [],
}
# Plain LoRA turned down, for its retention at other methods' gain.
SCALES = {"lora 0.001": [0.1, 0.25, 0.5, 0.75]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="TASK/NAME, without the rate")
    parser.add_argument("--list", action="store_true", help="say what is left to do")
    arguments = parser.parse_args()
    made = demo_specs().write(arguments.work / "data") | write_texts(arguments.work / "data")
    for one in small_runs():
        stored = RESULTS / one.task / f"{one.slug}.json"
        if stored.exists() or (arguments.only and f"{one.task}/{one.name}" not in arguments.only):
            continue
        if arguments.list:
            print(f"{one.task}/{one.label}")
            continue
        folder = arguments.work / one.task / one.slug
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder.with_suffix(".lock"), timeout=0):
                if stored.exists():
                    continue
                print(f"== {one.task}: {one.label}", flush=True)
                recipe = recipe_of(one, arguments.data, made, folder)
                record = load_record(run(recipe, progress=TerminalProgress()))
                write_atomically(stored, json.dumps(figures(one, record), indent=1) + "\n")
        except Timeout:
            print(f"{one.task}/{one.label}: another process is at it", flush=True)
        except ForgetlessError as error:
            print(f"{one.task}/{one.label}: {error}", flush=True)


def recipe_of(one: SmallRun, data: Path, made: dict[str, Path], folder: Path) -> Recipe:
    """The task's recipe with one run's method, rate, regulariser and sources.

    Files that are `made` here go before those of `data`.
    """

    def placed(spec: dict[str, Any]) -> dict[str, Any]:
        if "path" not in spec:
            return spec
        return spec | {"path": str(made.get(Path(spec["path"]).stem, data / spec["path"]))}

    tree = yaml.safe_load(RECIPES[one.task].read_text(encoding="utf-8"))
    evaluation = tree["evaluation"]
    evaluation["retention"] += FURTHER[one.task]
    preserve = [SOURCES[name] for name in one.sources] or [tree["preserve_data"]]
    changes: dict[str, Any] = {
        "label": one.label,
        "method": one.method,
        "train_data": placed(tree["train_data"]),
        "preserve_data": [placed(spec) for spec in preserve],
        "calibration.source_weights": one.source_weights,
        "training.learning_rate": one.rate,
        **{f"training.{key}": value for key, value in one.training.items()},
        "evaluation.scales": SCALES.get(one.label, []),
        "output": str(folder),
    }
    for side in ("gain", "retention"):
        changes[f"evaluation.{side}"] = [
            placed(item) | {"limit": ROWS[item["name"]]} for item in evaluation[side]
        ]
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return load_recipe(RECIPES[one.task], overrides)


def figures(one: SmallRun, record: Record) -> dict[str, Any]:
    """What is published of a run: no rows, no paths."""
    training = record.training
    return {
        "task": one.task,
        "name": one.name,
        "learning_rate": one.rate,
        "method": record.method,
        "training": one.training,
        "sources": one.sources,
        "source_weights": one.source_weights,
        "seed": record.seed,
        "created": record.created,
        "git_commit": record.git_commit,
        "versions": record.versions,
        "hardware": record.hardware | {"threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "model": record.model.model_dump(),
        "data": [d.model_dump() | {"source": Path(d.source).name} for d in record.data],
        "steps": training.steps,
        "tokens": training.tokens,
        "trainable_parameters": training.trainable_parameters,
        "warnings": len(record.warnings),
        "seconds": record.phases,
        "processor_seconds": record.processor,
        "evaluation": _report(record.evaluation),
        "scaled": [_report(report) for report in record.scaled],
    }


def _report(report: EvaluationReport) -> dict[str, Any]:
    moved = report.movement
    return {
        "scale": report.scale,
        "items": [i.model_dump(include={"name", "side", "rows", "metrics"}) for i in report.items],
        "movement": None if moved is None else moved.model_dump(exclude={"layers"}),
    }


if __name__ == "__main__":
    main()
