"""The demo: plain LoRA at its best of three rates, `contrastive` at its default rate, one report.

Every part is a recipe in the output folder, so that what the demo does can be read, changed and run
again. What was finished is not done twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgetless.atomic import write_atomically
from forgetless.experiments.progress import Progress
from forgetless.experiments.record import Record, load_record
from forgetless.experiments.report import write_report
from forgetless.experiments.run import run, train_only
from forgetless.models.demo_model import demo_model_path
from forgetless.models.hardware import has_fast_bf16, pick_device
from forgetless.recipe import Recipe, load_recipe

RATES = (2e-4, 5e-4, 1e-3)  # plain LoRA gets the one with the best validation NLL
QUICK_RATES = (1e-3,)
RANK = 32
METHOD = "contrastive"  # what kept most at plain LoRA's gain: docs/results.md
LABELS = {"lora": "LoRA", METHOD: METHOD}
VALIDATION_ROWS = 32
VALIDATION_ROWS_QUICK = 12


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo leaves behind.

    Attributes:
        records: Plain LoRA, then `contrastive`.
        report: The HTML page.
        validation: Plain LoRA's validation NLL by learning rate.
    """

    records: tuple[Record, ...]
    report: Path
    validation: dict[float, float]


def run_demo(
    folder: Path,
    *,
    quick: bool = False,
    progress: Progress | None = None,
    resume: str | None = None,
) -> DemoResult:
    """Run the demo, or what is left of it, in `folder`.

    Args:
        folder: Gets `data/`, a recipe and a run folder per method, and `report.html`.
        quick: Fewer rows of everything and one rate: shows the way, claims nothing.
        progress: Hears of every phase.
        resume: Command to print on Ctrl-C.
    """
    heard = progress or Progress()
    if not has_fast_bf16(pick_device()):
        heard.warn(
            "this processor has neither AMX nor AVX512-BF16: training is in float32 and takes "
            "several times longer than the README says"
        )
    with heard.phase("fetch the model"):
        demo_model_path(heard.note)
    with heard.phase("make the demo's data"):
        files = _write_data(folder / "data", quick)
    validation: dict[float, float] = {}
    rates = QUICK_RATES if quick else RATES
    for rate in rates:
        heard.note(f"plain LoRA at learning rate {rate:g}")
        recipe = _recipe(folder, files, "lora", rate, quick)
        if recipe.output.joinpath("record.json").exists():
            facts = load_record(recipe.output / "record.json").training
        else:
            facts = train_only(recipe, progress=heard, resume=resume)
        assert facts.validation_nll is not None  # the recipe holds rows out
        validation[rate] = facts.validation_nll
    best = min(validation, key=lambda rate: validation[rate])
    if len(rates) > 1:
        heard.note(f"plain LoRA is best on validation rows at learning rate {best:g}")
    heard.note(f"plain LoRA at {best:g}: what it gained and what it forgot")
    plain = run(_recipe(folder, files, "lora", best, quick), progress=heard, resume=resume)
    heard.note(f"{METHOD} at its default rate")
    kept = run(_recipe(folder, files, METHOD, None, quick), progress=heard, resume=resume)
    records = (load_record(plain), load_record(kept))
    report = write_report(records, folder / "report.html")
    return DemoResult(records, report, validation)


def _write_data(folder: Path, quick: bool) -> dict[str, Path]:
    # Imported here: the packages behind it come with the `demo` extra only, and take seconds.
    from forgetless.data.demo import demo_specs

    return demo_specs(quick=quick).write(folder)


def _recipe(
    folder: Path, files: dict[str, Path], method: str, rate: float | None, quick: bool
) -> Recipe:
    """Write one run's recipe into the folder, and read it back as a user's would be."""
    from forgetless.data.demo import RELATIONS

    name = method if rate is None else f"{method}-{rate:g}"
    own_rows = 24 if quick else 32  # sampling goes in batches of 32
    own_length = 48 if quick else 64
    tree: dict[str, Any] = {
        "model": "demo",
        # The gain and the forgetting of these runs are small against bf16 rounding of a whole
        # model: weights and evaluation in float32, training under bf16 autocast.
        "dtype": "float32",
        "method": {"name": method, "rank": RANK},
        "train_data": str(files["train"]),
        "preserve_data": [
            str(files["calibration_facts"]),
            {"self": True, "rows": [0, own_rows], "max_length": own_length},
        ],
        "training": {
            "epochs": 1,
            "batch_size": 4,
            "validation_rows": VALIDATION_ROWS_QUICK if quick else VALIDATION_ROWS,
            "bf16": has_fast_bf16(pick_device()),
        },
        "evaluation": {
            "samples": 1 if quick else 3,
            "scales": [],  # of plain LoRA too: the demo has ten minutes
            "gain": [
                {
                    "name": "family relationships",
                    "path": str(files["gain_test"]),
                    "metrics": ["nll", "contains"],
                    "labels": list(RELATIONS),
                    # The base answers in sentences; within 10 tokens half of them have no end.
                    "max_new_tokens": 32,
                    "batch_size": 50,
                }
            ],
            "retention": [
                {
                    "name": "world facts",
                    "path": str(files["evaluation_facts"]),
                    "metrics": ["kl", "nll", "greedy_match"],
                    "max_new_tokens": 10,
                    "batch_size": 32,
                },
                {
                    "name": "own text",
                    "self": True,
                    "rows": [own_rows, own_rows + (8 if quick else 32)],
                    "max_length": own_length,
                    "metrics": ["kl", "nll"],
                },
            ],
        },
        "label": LABELS[method],
        "claims": not quick,
        "output": str(folder / name),
    }
    if rate is not None:
        tree["training"]["learning_rate"] = rate
    path = write_atomically(
        folder / f"{name}.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    )
    return load_recipe(path)
