"""The verb `report`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from forgetless.cli.options import Json
from forgetless.cli.output import print_json, print_summary, print_text, wrapped

if TYPE_CHECKING:
    from forgetless.experiments.compare import Comparison
    from forgetless.experiments.record import Record

_WIDTH = 80
_MOST_TOLD = 5


def report(
    records: Annotated[
        list[Path],
        typer.Argument(help="Run folders, folders of them (a sweep), record.json files."),
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    table: Annotated[
        Literal["markdown", "csv"] | None,
        typer.Option(help="Print the figures as a table instead; no report is written."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML report of finished runs.

    Where methods have several rates or seeds, it compares methods: each at its best rate by rows
    held out of training, and against plain LoRA at the same gain.
    """
    from forgetless.experiments.compare import compare, has_several_runs
    from forgetless.experiments.record_files import find_records
    from forgetless.experiments.report import check_report_file, write_report
    from forgetless.experiments.runs import name_runs
    from forgetless.experiments.tables import figures

    if table is None:
        check_report_file(output)
    under = find_records(records)
    _tell_left_out(under.left_out)
    found = under.records
    compared = compare(found) if has_several_runs(found) else None
    if compared is not None and not compared.arms:
        compared = None  # what cannot be compared is told run by run
    if table is not None:
        print_text(_table(found, compared, table).rstrip("\n"))
        return
    written = write_report(found, output, comparison=compared)
    if as_json:
        rows = figures(name_runs(found))
        shown = {} if compared is None else {"comparison": compared.model_dump(mode="json")}
        print_json({"report": str(written), "figures": rows, **shown})
        return
    if compared is None:
        print_summary(found)
    else:
        _print_comparison(compared)
    print_text(f"\nReport: {written}")


def _tell_left_out(lines: list[str]) -> None:
    """On standard error, so that tables and JSON stay what they are; the first few of them."""
    for line in lines[:_MOST_TOLD]:
        typer.echo(wrapped("left out", line), err=True)
    if len(lines) > _MOST_TOLD:
        typer.echo(wrapped("", f"and {len(lines) - _MOST_TOLD} more"), err=True)


def _table(
    found: list[Record], compared: Comparison | None, kind: Literal["markdown", "csv"]
) -> str:
    from forgetless.experiments.compare import as_csv, flat_rows, markdown
    from forgetless.experiments.markdown import markdown_table
    from forgetless.experiments.runs import name_runs
    from forgetless.experiments.tables import figures

    if kind == "csv":
        return as_csv(figures(name_runs(found)) if compared is None else flat_rows(compared))
    return markdown_table(found) if compared is None else markdown(compared)


def _print_comparison(found: Comparison) -> None:
    """Title, sentences and notes at 80 columns."""
    for text in (f"{found.title}.", "", *found.words, "", *found.notes):
        print_text(
            textwrap.fill(
                text,
                _WIDTH,
                subsequent_indent="  " if text in found.words else "",
                break_on_hyphens=False,
            )
        )
