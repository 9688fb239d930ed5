"""The program `forgetless`: which verbs there are, and what an error becomes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import forgetless
from forgetless.cli import guides, reporting, sweeping, verbs
from forgetless.cli.output import print_text
from forgetless.cli.several import of_a_lost_process, refuse_several, says
from forgetless.errors import ElsewhereError, ForgetlessError


def _lines(title: str, *lines: str) -> str:
    """An epilog that is not wrapped: click looks for the backspace."""
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


app = typer.Typer(
    name="forgetless",
    help="Fine-tune a language model without it forgetting what it knew, with proof.",
    epilog="\n\n".join(
        [
            _lines(
                "First steps:",
                "forgetless demo --quick                      see it work",
                "forgetless new recipe.yaml --train my.jsonl  a recipe for your data",
                "forgetless run recipe.yaml                   everything; resumes",
                "forgetless inspect runs/recipe               what came out",
            ),
            _lines(
                "Exit status:",
                "0    done",
                "1    a fault of this program, with a traceback; or nobody reads the output",
                "2    a mistake in the input: one line says which, and what to do",
                "130  stopped by Ctrl-C; run and train resume",
            ),
            _lines(
                "Results go to standard output, progress to standard error.",
                "NO_COLOR=1 turns colours off; FORGETLESS_CACHE names the cache folder.",
            ),
        ]
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    refuse_several(context.invoked_subcommand)
    if version:
        print_text(forgetless.__version__)
        raise typer.Exit


def _add(verb: Callable[..., None], short: str, *examples: str, name: str | None = None) -> None:
    app.command(name=name, short_help=short, epilog=_lines("Examples:", *examples))(verb)


_add(
    verbs.demo,
    "See it work on a small model: plain LoRA, and one that keeps.",
    "forgetless demo --quick",
    "forgetless demo --output my-demo",
)
_add(
    guides.new,
    "Write a commented recipe for your model and data.",
    "forgetless new recipe.yaml --train train.jsonl",
    "forgetless new recipe.yaml --train train.csv --test test.csv \\",
    "    --preserve keep.jsonl --model path/to/model",
)
_add(
    verbs.run,
    "All that a recipe asks for; again after Ctrl-C: it resumes.",
    "forgetless run recipe.yaml",
    "forgetless run recipe.yaml method.rank=16 output=runs/r16",
    "forgetless run recipe.yaml 'method={name: sc-lora, beta: 0.5}'",
    "forgetless run recipe.yaml --quiet --json | jq .figures",
)
_add(
    verbs.calibrate,
    "Collect second moments only; a later run re-uses them.",
    "forgetless calibrate recipe.yaml",
)
_add(
    verbs.train,
    "Train only; a later run goes on with the evaluation.",
    "forgetless train recipe.yaml training.epochs=2",
)
_add(
    verbs.evaluate,
    "Measure a LoRA or a whole model, whoever trained it.",
    "forgetless evaluate recipe.yaml --adapter somebodys-lora",
    "forgetless evaluate recipe.yaml --tuned somebodys-model",
    "forgetless evaluate recipe.yaml 'evaluation.scales=[0.3, 0.7]'",
)
_add(
    sweeping.sweep,
    "Many runs of one recipe: a grid over any of its keys.",
    "forgetless sweep sweep.yaml --dry-run",
    "forgetless sweep sweep.yaml",
    "forgetless sweep sweep.yaml --processes 2 'grid.seed=[0, 1, 2]'",
    "forgetless sweep sweep.yaml --executor ray",
    "and the file, in full in docs/sweep.md:",
    "base: recipe.yaml",
    "grid: {method: [lora, lora-null], training.learning_rate: [2e-4, 1e-3]}",
    "output: sweeps/first",
)
_add(
    reporting.report,
    "One report of one or many runs, or a comparison of methods.",
    "forgetless report runs/a runs/b --output both.html",
    "forgetless report sweeps/first --output comparison.html",
    "forgetless report sweeps/first --table markdown > table.md",
    "forgetless report sweeps/first --table csv > figures.csv",
)
_add(
    verbs.export_adapter,
    "A plain LoRA, or a merged model, with its model card.",
    "forgetless export runs/first my-adapter",
    "forgetless export runs/first my-adapter --scale 0.7",
    "forgetless export runs/first my-model --target merged",
    "forgetless export runs/first my-gguf --target llama.cpp",
    "forgetless export runs/first my-adapter --target vllm --max-rank 16 \\",
    "    --moments-data train.jsonl",
    name="export",
)
_add(
    verbs.push,
    "Upload an export with its model card to the hub.",
    "forgetless push runs/first you/my-adapter --private",
    "forgetless export runs/first my-adapter --samples shareable",
    "forgetless push my-adapter you/my-adapter",
)
_add(
    guides.inspect,
    "What a run, an adapter, a cache or a base model is.",
    "forgetless inspect runs/first",
    "forgetless inspect somebodys-lora --model path/to/base",
    "forgetless inspect runs/first --moments moments-0123.safetensors",
)
_add(
    guides.methods,
    "What methods there are, from which paper, with what promise.",
    "forgetless methods",
)
_add(
    guides.schema,
    "The JSON schema of a recipe or a sweep, for editors.",
    "forgetless schema > recipe.schema.json",
    "forgetless schema sweep > sweep.schema.json",
    "then, as the first line of a recipe:",
    "# yaml-language-server: $schema=recipe.schema.json",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's mistake is one line and status 2, Ctrl-C status 130."""
    try:
        app(args=arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of JSON; rich does the same where it prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ForgetlessError, OSError, RuntimeError) as error:
        line = _in_one_line(error)
        if line is None:
            raise
        if says(line):
            sys.stderr.write(f"forgetless: {line}\n")
        sys.exit(2)


def _in_one_line(error: ForgetlessError | OSError | RuntimeError) -> str | None:
    """What to tell of an error that the user can do something about; None for a fault of ours."""
    if isinstance(error, ElsewhereError):
        return ""
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
    return of_a_lost_process(error) if isinstance(error, RuntimeError) else None
