"""Publish the records of a sweep: all that a comparison reads, without data, text and weights.

    python benchmarks/publish_sweep.py sweeps/gsm8k benchmarks/results/sweep_gsm8k
    forgetless report benchmarks/results/sweep_gsm8k

Figures by row stay, to five digits: they are numbers, and intervals need them. Figures by layer and
samples go.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from forgetless.atomic import write_atomically
from forgetless.errors import ArtefactError
from forgetless.evaluation.results import EvaluationReport, ItemResult, RowValues
from forgetless.experiments.record import Record, load_record

DIGITS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("published", type=Path)
    arguments = parser.parse_args()
    for folder in sorted((arguments.sweep / "runs").iterdir()):
        try:
            record = load_record(folder / "record.json")
        except ArtefactError as error:
            print(error)
            continue
        target = arguments.published / folder.name / "record.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, json.dumps(published(record)) + "\n")


def published(record: Record) -> dict[str, Any]:
    """The record as plain values; it loads as a record."""
    bare = record.model_copy(
        update={
            "layers": {},
            "evaluation": _bare(record.evaluation),
            "scaled": [_bare(report) for report in record.scaled],
            "git_commit": None,  # of a branch; the version is in `versions`
        }
    )
    tree: dict[str, Any] = bare.model_dump(mode="json")
    for facts in tree["data"]:
        facts["source"] = Path(facts["source"]).name
    return tree


def _bare(report: EvaluationReport) -> EvaluationReport:
    moved = report.movement
    return report.model_copy(
        update={
            "items": tuple(map(_without_samples, report.items)),
            "movement": None if moved is None else moved.model_copy(update={"layers": {}}),
        }
    )


def _without_samples(item: ItemResult) -> ItemResult:
    values = {metric: _rounded(by_row) for metric, by_row in item.row_values.items()}
    return item.model_copy(update={"samples": (), "row_values": values})


def _rounded(by_row: RowValues) -> RowValues:
    return RowValues.model_validate(
        {
            part: [float(f"{value:.{DIGITS}g}") for value in values]
            for part, values in by_row.model_dump().items()
        }
    )


if __name__ == "__main__":
    main()
