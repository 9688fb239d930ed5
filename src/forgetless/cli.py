"""The command line: verbs, parsing and printing only.

Results go to standard output, progress to standard error. Exit status: 0 done, 2 a mistake in the
input (one line says which), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import forgetless
from forgetless.errors import ForgetlessError

if TYPE_CHECKING:
    from forgetless.experiments.record import Record
    from forgetless.methods.base import Method

app = typer.Typer(
    name="forgetless",
    help="Fine-tune a language model without it forgetting what it knew, with proof.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TOGETHER = "\N{NO-BREAK SPACE}"  # a space at which no line is broken

RecipePath = Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/ for examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Recipe keys to change: training.epochs=2 method.rank=16", metavar="KEY=VALUE"
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's mistake is one line and status 2, Ctrl-C status 130."""
    try:
        app(args=arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ForgetlessError, OSError, RuntimeError) as error:
        line = _in_one_line(error)
        if line is None:
            raise
        sys.stderr.write(f"forgetless: {line}\n")
        sys.exit(2)


def _in_one_line(error: ForgetlessError | OSError | RuntimeError) -> str | None:
    """What to tell of an error that the user can do something about; None for a fault of ours."""
    if isinstance(error, ForgetlessError):
        return str(error)
    if isinstance(error, OSError):
        reason = error.strerror or " ".join(str(error).split())
        return f"{error.filename}: {reason}; check the path" if error.filename else reason
    torch = sys.modules.get("torch")  # never imported for this alone
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            "the device is out of memory; lower training.batch_size, calibration.batch_size or "
            "max_length, or set training.gradient_checkpointing=true"
        )
    return None


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        _print(forgetless.__version__)
        raise typer.Exit


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rows: shows the way, claims nothing.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for data, runs and report.")] = None,
) -> None:
    """Fine-tune a small model twice, plain LoRA and LoRA-Null, and compare what they forgot."""
    from forgetless.console import TerminalProgress
    from forgetless.experiments.demo import run_demo

    folder = output or Path("forgetless-demo-quick" if quick else "forgetless-demo")
    result = run_demo(folder, quick=quick, progress=TerminalProgress(), resume=_again())
    _print_summary(result.records)
    _print(
        f"\nReport: {result.report}\n\n"
        "The same with your own data: the demo's recipes are plain YAML files,\n"
        f"  {folder}/lora-null.yaml\n"
        "Change model, train_data and preserve_data in a copy, then\n"
        "  forgetless run my-recipe.yaml output=runs/mine\n"
    )


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Calibrate, initialise, train, measure, report and export: all that a recipe asks for."""
    from forgetless.console import TerminalProgress
    from forgetless.experiments.record import load_record
    from forgetless.experiments.run import run as run_recipe
    from forgetless.recipe import load_recipe

    made = load_recipe(recipe, overrides or ())
    path = run_recipe(made, progress=TerminalProgress(), resume=_again())
    _print_summary([load_record(path)])
    _print(f"\nReport:  {path.parent / 'report.html'}\nAdapter: {path.parent / 'adapter'}")


@app.command()
def calibrate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Collect second moments only; they are cached, and a later run re-uses them."""
    from forgetless.console import TerminalProgress
    from forgetless.experiments.run import calibrate_only
    from forgetless.recipe import load_recipe

    attached = calibrate_only(
        load_recipe(recipe, overrides or ()), progress=TerminalProgress(), resume=_again()
    )
    for role, found in attached.moments.items():
        widest = max(moment.width for moment in found.moments.values())
        _print(
            f"{role}: {found.num_tokens} tokens at {len(found.moments)} sites, the widest {widest}"
        )
    if not attached.moments:
        _print(f"method {attached.method.name} needs no calibration")


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train only; a later run of the same recipe goes on with the evaluation."""
    from forgetless.console import TerminalProgress
    from forgetless.experiments.run import train_only
    from forgetless.recipe import load_recipe

    facts = train_only(
        load_recipe(recipe, overrides or ()), progress=TerminalProgress(), resume=_again()
    )
    last = f", last loss {facts.curve[-1].loss:.3f}" if facts.curve else ""
    _print(f"{facts.steps} steps, {facts.tokens} tokens{last}")
    if facts.validation_nll is not None:
        _print(f"validation NLL {facts.validation_nll:.4f}")


@app.command()
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="LoRA or rsLoRA saved by PEFT (no DoRA, no biases), or a run's folder."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write all figures to this file, as JSON.")
    ] = None,
) -> None:
    """Measure an adapter that somebody trained, with a recipe's model and evaluation items."""
    with _told_on_stop():
        from forgetless.console import TerminalProgress
        from forgetless.experiments.markdown import evaluation_table
        from forgetless.experiments.measure_adapter import (
            check_figures_file,
            measure_adapter,
            write_figures,
        )
        from forgetless.recipe import load_recipe

        made = load_recipe(recipe, overrides or ())
        if output is not None:
            check_figures_file(output)
        reports = measure_adapter(made, adapter or made.output, progress=TerminalProgress())
    if Console().is_terminal:
        _print("\n\n".join(str(report) for report in reports))
    else:
        _print(evaluation_table(reports))
    if output is not None:
        _print(f"\nFigures: {write_figures(reports, output)}")


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="record.json files, or run folders.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML report of one or several finished runs."""
    from forgetless.experiments.record import load_record
    from forgetless.experiments.report import check_report_file, write_report

    check_report_file(output)
    found = [load_record(p / "record.json" if p.is_dir() else p) for p in records]
    _print_summary(found)
    _print(f"\nReport: {write_report(found, output)}")


@app.command(name="export")
def export_adapter(
    adapter: Annotated[Path, typer.Argument(help="Adapter, checkpoint or run folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="Base model; the adapter's own by default.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the update.")] = 1.0,
    merge: Annotated[bool, typer.Option("--merge", help="Write a merged model instead.")] = False,
) -> None:
    """Write a plain LoRA adapter that loads with peft alone, and check it by loading it again."""
    with _told_on_stop():
        from forgetless.console import TerminalProgress
        from forgetless.experiments.exporting import export_folder

        done = export_folder(
            adapter, output, model=model, scale=scale, merge=merge, progress=TerminalProgress()
        )
    kind = f"merged model in {done.dtype}" if merge else f"LoRA of rank {done.rank}"
    _print(f"{kind}: {output}")
    _print(
        f"reloaded: logits differ by at most {done.check.max_difference:.2e} "
        f"(largest logit {done.check.max_logit:.1f}),\n"
        f"the update of a layer by at most {done.check.max_update_error:.2e} of its norm"
    )


@app.command()
def methods() -> None:
    """List the methods: paper, what data they need, what they promise, default learning rate."""
    from forgetless.methods import METHODS

    for name, kind in METHODS.items():
        made = kind()
        needs = ", ".join(sorted(made.needs)) or "no"
        _print(f"{name}\n  {made.title}\n  source   {made.paper}\n  needs    {needs} data")
        _print(_wrapped("promise", made.promise))
        _print(_wrapped("options", _options(kind)))
        _print(_wrapped("rate", f"{made.default_learning_rate:g}: {made.learning_rate_source}"))
        _print("")


def _options(kind: type[Method]) -> str:
    """Every option with the values it may take and its default: `trains: b | both (b)`."""
    import dataclasses
    import typing

    types = typing.get_type_hints(kind)
    words = []
    for field in dataclasses.fields(kind):
        values = _values(types[field.name])
        default = "none" if field.default is None else field.default
        words.append(f"{field.name}: {values} ({default})".replace(" ", _TOGETHER))
    return ", ".join(words)


def _values(declared: object) -> str:
    """A type in a reader's words."""
    import typing

    names: dict[object, str] = {int: "whole number", float: "number", type(None): "none"}
    arguments = typing.get_args(declared)
    if typing.get_origin(declared) is typing.Literal:
        return " | ".join(map(str, arguments))
    if arguments:
        return " | ".join(map(_values, arguments))
    return names.get(declared, str(declared))


def _wrapped(label: str, text: str) -> str:
    import textwrap

    return textwrap.fill(
        text, 79, initial_indent=f"  {label:<9}", subsequent_indent=" " * 11, break_on_hyphens=False
    ).replace(_TOGETHER, " ")


def _print_summary(records: Sequence[Record]) -> None:
    from forgetless.experiments.report import summary_lines

    _print("")
    for line in summary_lines(records):
        _print(line)


def _print(text: str) -> None:
    Console(highlight=False, soft_wrap=True, markup=False).print(text)


@contextmanager
def _told_on_stop() -> Iterator[None]:
    """Say on Ctrl-C, also while modules load, how to run again."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"  stopped; run it again with this command:\n{_again()}\n")
        raise


def _again() -> str:
    """The command that the user typed, to type again."""
    return shlex.join(["forgetless", *sys.argv[1:]])
