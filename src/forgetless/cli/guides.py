"""Verbs that tell or prepare, and run nothing: new, inspect, schema, methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from forgetless.cli.options import Json
from forgetless.cli.output import TOGETHER, print_json, print_text, print_values, wrapped

if TYPE_CHECKING:
    from forgetless.methods.base import AnyMethod
    from forgetless.training.regularisers.base import Regulariser


def new(
    recipe: Annotated[Path, typer.Argument(help="YAML file to write.")],
    train: Annotated[str, typer.Option(help="File or folder of what is to be learned.")],
    test: Annotated[
        str | None,
        typer.Option(help="What it is tested on; the last rows of --train where not given."),
    ] = None,
    preserve: Annotated[
        list[str] | None,
        typer.Option(help="File or folder of what must not be forgotten; repeat for more."),
    ] = None,
    own_text: Annotated[
        bool,
        typer.Option("--self/--no-self", help="Keep what the model itself writes, too."),
    ] = True,
    model: Annotated[str, typer.Option(help="Hub id, path or demo.")] = "demo",
    method: Annotated[str, typer.Option(help="One of `forgetless methods`.")] = "lora-null",
    force: Annotated[bool, typer.Option("--force", help="Replace a file of that name.")] = False,
) -> None:
    """Write a commented recipe for your model and data, by the columns of the files."""
    import shlex

    from forgetless.experiments.new_recipe import write_recipe

    made = write_recipe(
        recipe,
        train=train,
        test=test,
        preserve=preserve or (),
        own_text=own_text,
        model=model,
        method=method,
        force=force,
    )
    for note in made.notes:
        typer.echo(wrapped("note", note), err=True)
    print_text(
        f"Recipe: {made.path}\n\nLook it over, then\n"
        f"  {shlex.join(['forgetless', 'run', str(made.path)])}"
    )


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A run, an adapter, a file of second moments, a base model.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Base of an adapter: load it, and measure the update against it."),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(help="Second moments of that base: measure the adapter's drift on them."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Describe a run, a cache of moments, a base model, or any PEFT LoRA."""
    from forgetless.cli.output import progress_of, results_only
    from forgetless.experiments.inspecting import inspect as describe

    with results_only(as_json):
        found = describe(
            path, model=model, moments=moments, progress=progress_of(quiet=True, verbose=False)
        )
    if as_json:
        print_json(found)
    else:
        print_values(_for_reading(found))


def _for_reading(found: dict[str, Any]) -> dict[str, Any]:
    """A description with its figures as short lines; the JSON has them whole."""
    lines = [
        f"{row['side']}, {row['item']}, {row['metric']}: {_change(row['base'], row['tuned'])}"
        for row in found.get("figures", ())
        if row["scale"] == 1.0
    ]
    skipped = [f"{name}: {why}" for name, why in found.get("skipped_layers", {}).items()]
    files = [
        f"{Path(entry['path']).name}: {entry['num_tokens']} tokens at {entry['sites']} sites of "
        f"model {entry['model']} in {entry['dtype']}"
        for entry in found.get("second_moments", ())
    ]
    shown = {"figures": lines, "skipped_layers": skipped, "second_moments": files}
    return {**found, **shown}


def _change(base: float | None, tuned: float | None) -> str:
    figures = [f"{value:.4g}" for value in (base, tuned) if value is not None]
    return " → ".join(figures) or "not finite"


def schema(
    kind: Annotated[
        Literal["recipe", "sweep"], typer.Argument(help="What the YAML is.")
    ] = "recipe",
) -> None:
    """Print the JSON schema of a recipe or a sweep, for editors that complete and check YAML."""
    import json
    import sys

    from forgetless.experiments.sweep.spec import sweep_schema
    from forgetless.recipe import json_schema

    found = sweep_schema() if kind == "sweep" else json_schema()
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def methods(as_json: Json = False) -> None:
    """List the methods and regularisers: paper, data they need, promise, options, rate."""
    from forgetless.methods import ALL_METHODS
    from forgetless.training.regularisers import REGULARISERS

    if as_json:
        print_json(
            {
                "methods": [_as_values(kind) for kind in ALL_METHODS.values()],
                "regularisers": [_regulariser(kind) for kind in REGULARISERS.values()],
            }
        )
        return
    for name, kind in ALL_METHODS.items():
        made = kind()
        needs = ", ".join(sorted(made.reads)) or "no"
        print_text(f"{name}\n  {made.title}\n  source   {made.paper}\n  needs    {needs} data")
        print_text(wrapped("promise", made.promise))
        print_text(wrapped("options", _options(kind) or "none"))
        print_text(wrapped("rate", f"{made.default_learning_rate:g}: {made.learning_rate_source}"))
        print_text("")
    print_text("Regularisers, in a recipe's training.regularisers:\n")
    for name, term in REGULARISERS.items():
        needs = "preserve" if term().needs_preserve else "no"
        print_text(f"{name}\n  {term.title}\n  source   {term.paper}\n  needs    {needs} data")
        print_text(wrapped("with", _works_with(term)))
        print_text(wrapped("options", _options(term)))
        print_text("")


def _as_values(kind: type[AnyMethod]) -> dict[str, Any]:
    from forgetless.methods import method_options

    made = kind()
    return {
        "name": made.name,
        "title": made.title,
        "paper": made.paper,
        "bibtex": list(made.bibtex),
        "needs": sorted(made.reads),
        "promise": made.promise,
        "options": {k: v for k, v in method_options(made).items() if k != "name"},
        "learning_rate": made.default_learning_rate,
        "learning_rate_source": made.learning_rate_source,
        "weight_decay": made.default_weight_decay,
    }


_WORDS = {"None": "none", "True": "true", "False": "false"}  # as YAML writes them


def _works_with(kind: type[Regulariser]) -> str:
    from forgetless.training.regularisers.base import Regulariser

    words = {"full": "full", "plain": "a plain LoRA", "a": "B frozen", "b": "A frozen"}
    missing = sorted(Regulariser.forms - kind.forms, reverse=True)
    names = [words.get(form, f"trains: {form}") for form in missing]
    return "any method" + (f", but not {' or '.join(names)}" if names else "")


def _regulariser(kind: type[Regulariser]) -> dict[str, Any]:
    from forgetless.named import options_of

    made = kind()
    return {
        "name": made.name,
        "title": made.title,
        "paper": made.paper,
        "needs_preserve_data": made.needs_preserve,
        "forms": sorted(made.forms),
        "options": {k: v for k, v in options_of(made).items() if k != "name"},
    }


def _options(kind: type[AnyMethod] | type[Regulariser]) -> str:
    """Every option with the values it may take and its default: `trains: b | both (b)`."""
    import dataclasses
    import typing

    types = typing.get_type_hints(kind)
    words = []
    for field in dataclasses.fields(kind):
        values = _values(types[field.name])
        default = _WORDS.get(str(field.default), field.default)
        words.append(f"{field.name}: {values} ({default})".replace(" ", TOGETHER))
    return ", ".join(words)


def _values(declared: object) -> str:
    """A type in a reader's words."""
    import typing

    names: dict[object, str] = {
        int: "whole number",
        float: "number",
        bool: "true | false",
        type(None): "none",
    }
    arguments = typing.get_args(declared)
    if typing.get_origin(declared) is typing.Literal:
        return " | ".join(map(str, arguments))
    if arguments:
        return " | ".join(map(_values, arguments))
    return names.get(declared, str(declared))
