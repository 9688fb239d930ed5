"""From a sweep's YAML to the runs it stands for: checked, named, and each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.data.validation import validated
from forgetless.errors import ForgetlessError, RecipeError
from forgetless.experiments.checks import check_before_loading, check_tasks
from forgetless.experiments.describe import label_of
from forgetless.experiments.output import plain_recipe
from forgetless.experiments.sweep.cells import Cell, cells_of
from forgetless.experiments.sweep.folder import RunFiles, SweepFolder
from forgetless.experiments.sweep.identity import run_name, sparse
from forgetless.experiments.sweep.spec import SweepSpec
from forgetless.recipe import Recipe


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        recipe: With its output folder and label.
        cell: What the sweep sets for it.
        files: Where it lies.
    """

    recipe: Recipe
    cell: Cell
    files: RunFiles

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.files.name

    @property
    def label(self) -> str:
        """For tables and reports."""
        return label_of(self.recipe)


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep.

    Attributes:
        spec: The sweep.
        folder: Where it lies.
        runs: In the order in which they are begun.
        repeated: How many cells stand for a run that another cell stands for already.
    """

    spec: SweepSpec
    folder: SweepFolder
    runs: tuple[PlannedRun, ...]
    repeated: int


def plan_sweep(spec: SweepSpec, *, allow_task_code: bool = False) -> Plan:
    """Make and check every recipe, and read the data once; nothing is written.

    Raises:
        RecipeError: A cell that is no recipe, named with its values; a folder of something else.
        DataError: Data that cannot be used.
    """
    folder = SweepFolder(spec.output)
    folder.check()
    base, runs = spec.base_tree(), dict[str, PlannedRun]()
    cells = cells_of(spec)
    for cell in cells:
        try:
            planned = _planned(cell, base, folder)
        except ForgetlessError as failure:
            raise RecipeError(f"cell {cell}: {failure}") from None
        first = runs.setdefault(planned.name, planned)
        _refuse_other_measures(first, planned)
    _check_data(list(runs.values()), allow_task_code=allow_task_code)
    return Plan(spec, folder, tuple(runs.values()), repeated=len(cells) - len(runs))


def resolved(plan: Plan) -> dict[str, Any]:
    """The sweep with its base as keys, as plain values."""
    spec = plan.spec.model_dump(mode="json", exclude={"fixed"}, fallback=repr)
    return spec | {"base": plan.spec.base_tree()}


def _planned(cell: Cell, base: dict[str, Any], folder: SweepFolder) -> PlannedRun:
    tree = cell.tree(base)
    for key in ("output", "claims"):
        if key in cell.values:
            raise RecipeError(
                f"{key}: expected no such key in a sweep; it names its folders itself"
            )
    recipe = sparse(validated(Recipe, {**tree, "output": folder.path}))
    files = RunFiles(folder, folder.name_of(run_name(recipe)))
    label = recipe.label if "label" in cell.values else cell.label(_base_label(recipe, cell))
    return PlannedRun(recipe.model_copy(update={"output": files.run, "label": label}), cell, files)


def _base_label(recipe: Recipe, cell: Cell) -> str:
    """The base's own label, else its method with the regularisers that the cell does not set."""
    sets = "training.regularisers" in cell.values
    return recipe.label or (str(recipe.method["name"]) if sets else label_of(recipe))


def _refuse_other_measures(first: PlannedRun, other: PlannedRun) -> None:
    """One folder is measured in one way: what is measured may not differ between equal runs."""
    if plain_recipe(first.recipe)["evaluation"] != plain_recipe(other.recipe)["evaluation"]:
        raise RecipeError(
            f"cell {other.cell}: expected what is trained to differ from that of the cell "
            f"{first.cell}, got another `evaluation` alone; measure all of it in one run"
        )


def _check_data(runs: Sequence[PlannedRun], *, allow_task_code: bool) -> None:
    """Each combination of sources once: a sweep repeats few of them many times."""
    seen: set[str] = set()
    for run in runs:
        tree = plain_recipe(run.recipe)
        parts = ("train_data", "preserve_data", "evaluation")
        described = repr([*(tree[part] for part in parts), tree["training"]["report_to"]])
        if described in seen:
            continue
        seen.add(described)
        try:
            check_before_loading(run.recipe)
            check_tasks(run.recipe, allow_task_code=allow_task_code)
        except ForgetlessError as failure:
            raise type(failure)(f"cell {run.cell}: {failure}") from None
