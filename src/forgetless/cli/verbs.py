"""Verbs that work: demo, run and its parts, evaluate, export, push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from forgetless.cli.options import Json, Overrides, Quiet, RecipePath, TaskCode, Verbose
from forgetless.cli.output import (
    again,
    print_json,
    print_summary,
    print_text,
    progress_of,
    results_only,
    told_on_stop,
)
from forgetless.cli.several import is_first
from forgetless.errors import AdapterError

if TYPE_CHECKING:
    from forgetless.adapters.card import Samples


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rows: shows the way, claims nothing.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for data, runs and report.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a small model twice, plain LoRA and contrastive, and compare what they forgot."""
    from forgetless.experiments.demo import METHOD, run_demo

    folder = output or Path("forgetless-demo-quick" if quick else "forgetless-demo")
    result = run_demo(folder, quick=quick, progress=progress_of(quiet, verbose), resume=again())
    print_summary(result.records)
    print_text(
        f"\nReport: {result.report}\n\n"
        "The same with your own data: the demo's recipes are plain YAML files,\n"
        f"  {folder}/{METHOD}.yaml\n"
        "Change model, train_data and preserve_data in a copy, then\n"
        "  forgetless run my-recipe.yaml output=runs/mine\n"
    )


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    allow_task_code: TaskCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Calibrate, initialise, train, measure, report and export: all that a recipe asks for."""
    from forgetless.experiments.record import load_record
    from forgetless.experiments.run import run as run_recipe
    from forgetless.experiments.runs import name_runs
    from forgetless.experiments.tables import figures
    from forgetless.recipe import load_recipe

    made = load_recipe(recipe, overrides or ())
    first = is_first()  # afterwards each process is on its own
    with results_only(as_json):
        path = run_recipe(
            made,
            progress=progress_of(quiet, verbose),
            resume=again(),
            allow_task_code=allow_task_code,
        )
    if not first:
        return
    record = load_record(path)
    made_in = str(record.export.get("folder", "adapter"))  # adapter, or model
    paths = {"report": path.parent / "report.html", made_in: path.parent / made_in}
    if as_json:
        named = {"record": path} | paths
        print_json(
            {k: str(v) for k, v in named.items()} | {"figures": figures(name_runs([record]))}
        )
        return
    print_summary([record])
    print_text("")
    for what, where in paths.items():
        print_text(f"{what.capitalize() + ':':<9}{where}")


def calibrate(
    recipe: RecipePath,
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Collect second moments only; they are cached, and a later run re-uses them."""
    from forgetless.experiments.run import calibrate_only
    from forgetless.models.hardware import GIB, peak_memory
    from forgetless.recipe import load_recipe

    first = is_first()
    started = calibrate_only(
        load_recipe(recipe, overrides or ()), progress=progress_of(quiet, verbose), resume=again()
    )
    if not first:
        return
    for role, found in started.calibrated.items():
        print_text(
            f"{role}: {found.tokens} tokens at {found.sites} sites, the widest {found.width}"
        )
    if not started.calibrated:
        print_text(f"method {started.method.name} needs no calibration")
        return
    passes = "one pass" if started.passes == 1 else f"{started.passes} passes"
    print_text(
        f"Moments held at a time: {started.moment_bytes / GIB:.2f} GiB, in {passes} over the data"
    )
    peak = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in peak_memory().items())
    print_text(f"Peak memory: {peak}")


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train only; a later run of the same recipe goes on with the evaluation."""
    from forgetless.experiments.run import train_only
    from forgetless.recipe import load_recipe

    first = is_first()
    facts = train_only(
        load_recipe(recipe, overrides or ()), progress=progress_of(quiet, verbose), resume=again()
    )
    if not first:
        return
    last = f", last loss {facts.curve[-1].loss:.3f}" if facts.curve else ""
    print_text(f"{facts.steps} steps, {facts.tokens} tokens{last}")
    if facts.validation_nll is not None:
        print_text(f"validation NLL {facts.validation_nll:.4f}")


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="LoRA or rsLoRA saved by PEFT (no DoRA, no biases), or a run's folder."),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(help="In place of an adapter: a whole model, tuned in full, merged, …"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write all figures to this file, as JSON.")
    ] = None,
    allow_task_code: TaskCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what somebody trained, with a recipe's base model and evaluation items."""
    with told_on_stop():
        from forgetless.experiments.markdown import evaluation_table
        from forgetless.experiments.measure_adapter import (
            check_figures_file,
            measure_adapter,
            write_figures,
        )
        from forgetless.recipe import load_recipe

        made = load_recipe(recipe, overrides or ())
        if adapter is not None and tuned is not None:
            raise AdapterError("--adapter, --tuned: expected one of the two, got both")
        if output is not None:
            check_figures_file(output)
        with results_only(as_json):
            reports = measure_adapter(
                made,
                adapter or made.output,
                tuned=tuned,
                progress=progress_of(quiet, verbose),
                allow_task_code=allow_task_code,
            )
    if as_json:
        # Rows one by one are for --output.
        shown = [r.model_dump_json(exclude={"items": {"__all__": {"row_values"}}}) for r in reports]
        print_json({"reports": [json.loads(text) for text in shown]})
    elif Console().is_terminal:
        print_text("\n\n".join(str(report) for report in reports))
    else:
        print_text(evaluation_table(reports))
    if output is not None:
        written = write_figures(reports, output)
        if not as_json:
            print_text(f"\nFigures: {written}")


def export_adapter(
    adapter: Annotated[Path, typer.Argument(help="Adapter, checkpoint or run folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="Base model; the adapter's own by default.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="peft (the default), vllm, sglang or tgi: an adapter that keeps the engine's "
            "rules; llama.cpp: one as GGUF; merged: a whole model."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the update.")] = 1.0,
    max_rank: Annotated[
        int | None, typer.Option(help="Cut the rank to this, and say what that loses.")
    ] = None,
    moments_data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|self",
            help="Data like those that the adapter is used on: the cut loses least there.",
        ),
    ] = None,
    quantization: Annotated[
        str,
        typer.Option(
            metavar="nf4|int8|…", help="Quantise the base while it is loaded: less memory."
        ),
    ] = "none",
    merge: Annotated[bool, typer.Option("--merge", help="The same as --target merged.")] = False,
    samples: Annotated[
        str,
        typer.Option(
            metavar="none|shareable|all",
            help="Generated texts in the model card; shareable: not those of self data, nor of "
            "items with redistributable: false.",
        ),
    ] = "none",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write an adapter that PEFT and an engine take, or a merged model, and check it by reloading.

    Everything but `llama.cpp` and `merged` is a plain LoRA of one rank that loads with peft alone.
    """
    with told_on_stop():
        from forgetless.experiments.exporting import export_folder

        if merge and target not in (None, "merged"):
            raise AdapterError(
                f"--merge: expected no other --target, got {target}; --merge is --target merged"
            )
        chosen = "merged" if merge else target or "peft"
        progress = progress_of(quiet, verbose)
        with results_only(as_json):
            done = export_folder(
                adapter,
                output,
                model=model,
                target=chosen,
                scale=scale,
                max_rank=max_rank,
                moments_data=moments_data,
                quantization=quantization,
                samples=cast("Samples", samples),
                progress=progress,
            )
    if as_json:
        print_json({"folder": str(output), "target": chosen, **done.figures()})
        return
    print_text(f"{done.summary}: {output}")
    print_text(
        f"reloaded: logits differ by at most {done.check.max_difference:.2e} "
        f"(largest logit {done.check.max_logit:.1f}),\n"
        f"the update of a layer by at most {done.check.max_update_error:.2e} of its norm"
    )
    if done.compression is not None:
        for line in done.compression.lines():
            print_text(line)
        if done.is_peft:
            print_text(f"gain after the cut: forgetless evaluate RECIPE --adapter {output}")


def push(
    folder: Annotated[Path, typer.Argument(help="An exported folder, or a finished run.")],
    repo_id: Annotated[str, typer.Argument(help="you/name, on the Hugging Face hub.")],
    private: Annotated[
        bool,
        typer.Option("--private", help="Into a private repository only; a new one is made so."),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to write to; it must exist. main by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload what `export` or `run` wrote, with its model card, to the Hugging Face hub.

    Only the export's own files; files of these names in the repository are replaced, others stay.
    """
    with told_on_stop():
        from forgetless.adapters.hub import push_folder

        with results_only(as_json):
            done = push_folder(folder, repo_id, private=private or None, revision=revision)
    if as_json:
        print_json({"url": done.url, "commit": done.commit, "files": list(done.files)})
        return
    print_text(f"{len(done.files)} files: {done.url}")
