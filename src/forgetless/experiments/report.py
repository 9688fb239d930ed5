"""One self-contained HTML page from one or several records: no network, all text escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from forgetless.atomic import write_atomically
from forgetless.errors import ArtefactError
from forgetless.escaping import clean, one_line
from forgetless.experiments.charts import loss_panel, trade_off_panels
from forgetless.experiments.compare import Comparison, compare, flat_rows, has_several_runs
from forgetless.experiments.compare.planes import colour_of, plane_panels
from forgetless.experiments.compare.shown import MOST_SHOWN, recipes_of, shown_records
from forgetless.experiments.compare.tables import grids
from forgetless.experiments.drawing import base_key, key_sign
from forgetless.experiments.exchanges import exchanges
from forgetless.experiments.headline import headline, summary_lines
from forgetless.experiments.layer_charts import layer_rows
from forgetless.experiments.markdown import markdown_table
from forgetless.experiments.provenance import facts, making, phase_rows
from forgetless.experiments.record import Record
from forgetless.experiments.runs import name_runs, task_lines
from forgetless.experiments.tables import figures, movement_rows, result_tables

__all__ = ["markdown_table", "summary_lines", "write_report"]

# What tells a report from other pages, early in the file; reports had the title alone once.
_GENERATOR = '<meta name="generator" content="forgetless">'
_OLD_TITLE = "· forgetless</title>"


def write_report(
    records: Sequence[Record],
    path: Path,
    title: str | None = None,
    comparison: Comparison | None = None,
) -> Path:
    """Write the report of one or several records as one HTML file.

    Where methods have several rates or seeds, the report compares methods, and shows one run each.

    Args:
        records: In the order to show; plain LoRA among them is the baseline of all claims.
        path: File to write; its folder is made, and an older file is replaced as a whole.
        title: Stands above the computed headline; the base model's name where it is not given.
        comparison: Of these records, where it is made already.

    Returns:
        `path`.

    Raises:
        ArtefactError: No records, or the file cannot be written.
    """
    if not records:
        raise ArtefactError("report: expected at least one record, got none; name a run's folder")
    if comparison is None and has_several_runs(records):
        comparison = compare(records)
    if comparison is not None and not comparison.arms:
        comparison = None  # nothing can be compared: run by run, then
    page = _render(records, title, comparison)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise ArtefactError(
            f"report: cannot write {path} ({error.strerror}); free space or choose another path"
        ) from error
    return path


def is_report(path: Path) -> bool:
    """Whether a file begins as a report does."""
    with path.open("rb") as file:
        start = file.read(4096)
    return start.lower().startswith(b"<!doctype html>") and any(
        sign in start for sign in (_GENERATOR.encode(), _OLD_TITLE.encode())
    )


def is_whole_report(path: Path) -> bool:
    """Whether a file is a report, from its beginning to its end."""
    return path.is_file() and is_report(path) and path.read_bytes().rstrip().endswith(b"</html>")


def check_report_file(path: Path) -> None:
    """Refuse to write a report over something else.

    Raises:
        ArtefactError: A folder, or a file that is no report.
    """
    if path.is_dir():
        raise ArtefactError(f"{path}: expected a file to write, got a folder; add a file name")
    if path.exists() and path.stat().st_size and not is_report(path):
        raise ArtefactError(
            f"{path}: expected a new file, or a report to replace, got a file of something else; "
            "choose another name with --output"
        )


def inline_json(value: Any) -> Markup:
    """JSON that can stand inside a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _render(records: Sequence[Record], title: str | None, comparison: Comparison | None) -> str:
    runs = name_runs(records if comparison is None else shown_records(records))
    environment = Environment(
        loader=PackageLoader("forgetless.experiments"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    script = (
        environment.loader.get_source(environment, "report.js")[0] if environment.loader else ""
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    models = list(dict.fromkeys(one_line(run.record.model.name) for run in runs))
    return environment.get_template("report.html.j2").render(
        title=one_line(title) if title else ", ".join(models),
        headline=headline(runs),
        comparison=None if comparison is None else _compared(comparison, records),
        runs=runs,
        key=key_sign,
        base_key=base_key(),
        tables=result_tables(runs),
        tasks=task_lines([run.record.evaluation for run in runs]),
        movement=movement_rows(runs),
        trade_off=trade_off_panels(runs),
        curves=loss_panel(runs),
        layers=layer_rows(runs),
        has_scaled=any(run.record.scaled for run in runs),
        exchanges=exchanges(runs),
        facts=facts(runs),
        phases=phase_rows(runs),
        makings=[making(run) for run in runs],
        figures=inline_json(figures(runs) if comparison is None else flat_rows(comparison)),
        generator=Markup(_GENERATOR),
        script=Markup(script),
        script_hash=digest,
    )


def _compared(found: Comparison, records: Sequence[Record]) -> dict[str, Any]:
    """What the page shows of a comparison."""
    plain_ones = [arm.is_lora for arm in found.arms]
    return {
        "title": found.title,
        "words": found.words,
        "notes": found.notes,
        "arms": [
            {"name": arm.name, "index": place, "colour": colour_of(plain_ones, place)}
            for place, arm in enumerate(found.arms)
        ],
        "grids": grids(found),
        "panels": plane_panels(found, recipes_of(records)),
        "runs": len(records),
        "most_shown": MOST_SHOWN,
    }
