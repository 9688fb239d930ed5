"""The verb `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from forgetless.cli.options import Json, Overrides, Quiet, TaskCode, Verbose
from forgetless.cli.output import again, print_json, print_text, results_only, told_on_stop, wrapped
from forgetless.errors import ForgetlessError

if TYPE_CHECKING:
    from forgetless.cli.sweep_table import Level
    from forgetless.experiments.sweep import SweepSpec, SweepStatus
    from forgetless.experiments.sweep.sharing import Shared


def sweep(
    spec: Annotated[Path, typer.Argument(help="A YAML sweep: a base recipe and what varies.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and its cost; run nothing.")
    ] = False,
    executor: Annotated[
        str | None,
        typer.Option(metavar="local|ray", help="What runs them, in place of the file's."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="How many at a time, on each GPU, in place of the file's.")
    ] = None,
    allow_task_code: TaskCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run every combination of what varies, each once; again after Ctrl-C: it goes on.

    Runs share what they can: second moments, starts, and the base's own figures are made once.
    """
    with told_on_stop():
        from forgetless.cli.sweep_table import SweepTable
        from forgetless.experiments.sweep import load_sweep, look_at, plan_sweep
        from forgetless.experiments.sweep import sweep as run_sweep

        given = [*(overrides or ())]
        given += [f"executor={executor}"] if executor is not None else []
        given += [f"processes={processes}"] if processes is not None else []
        made = load_sweep(spec, given)
        level = _level(quiet, verbose)
        if dry_run:
            with results_only(as_json):
                status = look_at(plan_sweep(made, allow_task_code=allow_task_code))
            _show_plan(status, as_json=as_json)
            return
    with results_only(as_json), SweepTable(level=level) as shown:
        status = run_sweep(made, progress=shown, resume=again(), allow_task_code=allow_task_code)
    _show_result(status, made, as_json=as_json)
    if status.count()["failed"]:
        raise typer.Exit(2)


def _level(quiet: bool, verbose: bool) -> Level:
    if quiet and verbose:
        raise ForgetlessError("--quiet, --verbose: expected one of the two, got both")
    return "quiet" if quiet else "verbose" if verbose else "normal"


def _show_plan(status: SweepStatus, *, as_json: bool) -> None:
    from dataclasses import asdict

    from forgetless.cli.sweep_table import duration, table
    from forgetless.experiments.sweep.estimate import cost_of
    from forgetless.experiments.sweep.sharing import shared_by

    plan, count = status.plan, status.count()
    cost, shared = cost_of(status), shared_by(plan.runs)
    if as_json:
        print_json(_as_values(status) | {"cost": asdict(cost), "shared": asdict(shared)})
        return
    _print_table(table(status))
    repeated = _number(plan.repeated, "cell is a repeat", "cells are repeats")
    repeats = f"; {repeated}" if plan.repeated else ""
    before = ", ".join(f"{count[s]} {s}" for s in ("done", "running", "failed") if count[s])
    print_text("")
    room = ", less where the cluster has room for more" if plan.spec.executor == "ray" else ""
    lines = {
        "runs": f"{len(plan.runs)} in {plan.folder.path}{repeats}",
        "before": before or "nothing yet",
        "shared": _shared_in_words(shared),
        "to do": _work_in_words(cost),
        "time": "none"
        if not cost.runs
        else f"about {duration(cost.seconds)} with {status.slots} at a time{room}, {cost.source}"
        if cost.seconds is not None
        else cost.source,
    }
    for label, text in lines.items():
        print_text(wrapped(label, text))


def _shared_in_words(shared: Shared) -> str:
    bases = _number(shared.bases, "base model", "base models")
    parts = [f"{bases} measured once"]
    if shared.calibrated:
        passes = _number(shared.moments, "calibration pass", "calibration passes")
        parts.append(f"{passes} for {_number(shared.calibrated, 'run', 'runs')}")
    if shared.solved:
        starts = _number(shared.starts, "solved start", "solved starts")
        parts.append(f"{starts} for {_number(shared.solved, 'run', 'runs')}")
    return ", ".join(parts)


def _number(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _work_in_words(cost: Any) -> str:
    runs = _number(cost.runs, "run", "runs")
    if not cost.runs:
        return "nothing"
    if cost.steps is None:
        return f"{runs}; their rows cannot be counted before the model is loaded"
    return f"{runs}, {cost.steps} steps, at most {cost.tokens:,} train tokens"


def _show_result(status: SweepStatus, spec: SweepSpec, *, as_json: bool) -> None:
    from forgetless.cli.sweep_table import headline, table

    if as_json:
        print_json(_as_values(status))
        return
    _print_table(table(status))
    print_text(f"\n{headline(status)}")
    failed = [one for one in status.runs if one.state == "failed"]
    for one in failed:
        print_text(wrapped("failed", f"{one.run.label}: {one.error}"))
        print_text(f"  log      {one.run.files.log}")
    if failed:
        print_text("\nThe same command tries them again.")
    if len(failed) < len(status.runs):
        print_text(f"\nCompare them: forgetless report {spec.output}")


def _print_table(shown: Any) -> None:
    from rich.console import Console

    Console(highlight=False, width=80).print(shown)


def _as_values(status: SweepStatus) -> dict[str, Any]:
    count = status.count()
    return {
        "sweep": str(status.plan.folder.path),
        "counts": {str(state): number for state, number in count.items()},
        "repeated_cells": status.plan.repeated,
        "runs": [
            {
                "name": one.run.name,
                "label": one.run.label,
                "state": one.state,
                "folder": str(one.run.files.run),
                "values": cast("dict[str, Any]", dict(one.run.cell.values)),
                "seconds": one.seconds or None,
                "error": one.error or None,
                "log": str(one.run.files.log),
            }
            for one in status.runs
        ],
    }
