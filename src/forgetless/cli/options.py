"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="A YAML recipe; `forgetless new` writes one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Recipe keys to change: training.epochs=2 method.rank=16", metavar="KEY=VALUE"
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else, for scripts.")
]
TaskCode = Annotated[
    bool,
    typer.Option(
        "--allow-task-code",
        help="Let task files in the recipe's lm_eval.include_path run Python.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Tell of warnings only, not of progress.")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="More lines, each with the time of day, and no bars."),
]
