"""The table of docs/results.md: methods at two learning rates each, small runs.

    python benchmarks/small_runs.py DATA OUTPUT [--only LABEL ...]

DATA holds gsm8k_train.jsonl, gsm8k_test.jsonl, nq_open_dev.jsonl and webquestions_train.jsonl.
Finished runs are skipped and broken ones resumed: stop it whenever you like and run it again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetless.console import TerminalProgress
from forgetless.data.demo import demo_specs
from forgetless.evaluation.items import EvaluationItem
from forgetless.experiments.markdown import markdown_table
from forgetless.experiments.record import load_record
from forgetless.experiments.report import write_report
from forgetless.experiments.run import run
from forgetless.recipe import Recipe, load_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "gsm8k.yaml"
METHODS = {
    "lora": "{name: lora, rank: 32}",
    "lora-null v2": "{name: lora-null, rank: 32, trains: b}",
    "lora-null v1": "{name: lora-null, rank: 32, trains: both}",
    "sc-lora 0.5": "{name: sc-lora, rank: 32, beta: 0.5}",
    "sc-lora 0.8": "{name: sc-lora, rank: 32, beta: 0.8}",
}
RATES = (2e-4, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    facts = demo_specs().write(arguments.output / "data")["evaluation_facts"]
    records = []
    for name, method in METHODS.items():
        for rate in RATES:
            label = f"{name} {rate:g}"
            if arguments.only and label not in arguments.only:
                continue
            folder = arguments.output / label.replace(" ", "-")
            overrides = [
                f"label={label}",
                f"method={method}",
                f"training.learning_rate={rate}",
                f"train_data.path={arguments.data / 'gsm8k_train.jsonl'}",
                f"preserve_data.path={arguments.data / 'nq_open_dev.jsonl'}",
                f"evaluation.gain.0.path={arguments.data / 'gsm8k_test.jsonl'}",
                f"evaluation.retention.0.path={arguments.data / 'nq_open_dev.jsonl'}",
                f"evaluation.retention.1.path={arguments.data / 'webquestions_train.jsonl'}",
                f"output={folder}",
            ]
            print(f"== {label}", flush=True)
            recipe = with_facts(load_recipe(RECIPE, overrides), facts)
            records.append(load_record(run(recipe, progress=TerminalProgress())))
            (arguments.output / "table.md").write_text(markdown_table(records))
    write_report(records, arguments.output / "report.html")
    print(markdown_table(records))


def with_facts(recipe: Recipe, facts: Path) -> Recipe:
    """The recipe with world facts as one more retention item."""
    item = EvaluationItem(
        name="world facts", path=facts, limit=100, metrics=("kl", "nll", "greedy_match")
    )
    retention = [*recipe.evaluation.retention, item]
    evaluation = recipe.evaluation.model_copy(update={"retention": retention})
    return recipe.model_copy(update={"evaluation": evaluation})


if __name__ == "__main__":
    main()
