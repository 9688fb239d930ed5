"""The YAML of a sweep: a base recipe, what varies, and how many runs go at a time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from forgetless.data.validation import shortened, validated
from forgetless.errors import ForgetlessError, RecipeError
from forgetless.recipe import OutputFolder, give_options_a_place, override_tree
from forgetless.recipe_yaml import apply_override, quoting_hint, read_yaml, set_value

Executor = Literal["local", "ray"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RaySpec(_Part):
    """What a run asks a Ray cluster for.

    Attributes:
        address: Of the cluster; Ray's own rule where not given: `RAY_ADDRESS`, one that runs on
            this machine, else a new one on it.
        gpus: GPUs a run; 1 where the cluster has any, else none.
        cpus: Cores a run; `threads`, else 1.
    """

    address: str | None = None
    gpus: float | None = Field(default=None, ge=0)
    cpus: float | None = Field(default=None, gt=0)


class SweepSpec(_Part):
    """One sweep.

    Attributes:
        base: A recipe: a path, relative to the working directory as all paths of recipes are, or
            its keys. Its `output` is not needed.
        fixed: Recipe keys that all runs have in place of the base's, `training.epochs: 2`.
        grid: Values by recipe key, `training.learning_rate: [2e-4, 1e-3]`; every combination of
            them is a run.
        runs: Further runs, each a small grid of its own: `{method: lora, seed: [0, 1]}`. To set
            a key to a list, put that list into a list.
        output: Folder of the sweep.
        executor: What runs them: processes on this machine, or a Ray cluster.
        processes: How many at a time; on each GPU, where there are several. A Ray cluster takes as
            many as it has room for.
        threads: Cores of a process; all, shared out among the processes, where not given.
        retries: How often a run that broke down, and not by a mistake in its input, is tried again
            in one go.
        ray: What a run asks a Ray cluster for.
    """

    base: Path | dict[str, Any]
    fixed: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    runs: list[dict[str, Any]] = []
    output: OutputFolder
    executor: Executor = "local"
    processes: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    retries: int = Field(default=1, ge=0)
    ray: RaySpec = RaySpec()

    @field_validator("base", mode="before")
    @classmethod
    def _path_or_keys(cls, base: object) -> object:
        if isinstance(base, str | Path | dict):
            return base
        raise RecipeError(
            f"base: expected a recipe's path or its keys, got {shortened(base)}; give one of them"
        )

    @model_validator(mode="after")
    def _something_to_run(self) -> SweepSpec:
        if not self.grid and not self.runs:
            raise RecipeError(
                "grid, runs: expected one of them at least, got neither; for a single recipe there "
                "is `forgetless run`"
            )
        entries = {"grid": self.grid} | {f"runs.{n}": entry for n, entry in enumerate(self.runs)}
        for place, entry in entries.items():
            for key, values in entry.items():
                if values == []:
                    raise RecipeError(
                        f"{place}.{key}: expected a list of values, got an empty one; to set a key "
                        "to an empty list, put it into a list"
                    )
        for key in self.fixed:
            if key in ("output", "claims"):
                raise RecipeError(
                    f"fixed.{key}: expected no such key in a sweep; it names its folders itself"
                )
            if varied := _varied_by(self, key):
                raise RecipeError(
                    f"fixed.{key}: expected a key that does not vary, got one that the sweep sets "
                    f"by {varied}; take one of them out"
                )
        return self

    def base_tree(self) -> dict[str, Any]:
        """The base recipe's keys with the fixed ones; none of them is checked yet.

        Raises:
            RecipeError: The file cannot be read, or a fixed key has no place there.
        """
        tree = deepcopy(self.base) if isinstance(self.base, dict) else read_yaml(self.base)
        give_options_a_place(tree)
        for key, value in self.fixed.items():
            set_value(tree, key.split("."), deepcopy(value), f"fixed.{key}")
            give_options_a_place(tree)
        return tree


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read a sweep and apply overrides, which leaves the base as keys.

    Args:
        path: A YAML file.
        overrides: `key=value` as for a recipe, of the base's keys, and of the sweep's own:
            `processes=2`, `grid.seed=[0, 1]`. `output` is the sweep's.

    Raises:
        RecipeError: The file, an override or a key of the sweep is wrong. Recipes are checked where
            the sweep is planned.
    """
    path = Path(path)
    tree = read_yaml(path)
    if "model" in tree and "base" not in tree:
        raise RecipeError(
            f"{path}: expected a sweep, with base and grid or runs, got a recipe; `forgetless run` "
            f"runs it, and `base: {path}` in a sweep varies it"
        )
    own = [text for text in overrides if _key(text).split(".")[0] in SweepSpec.model_fields]
    for text in own:
        _apply(tree, text)
    try:
        spec = validated(SweepSpec, tree)
        _refuse_varied(spec, [text for text in overrides if text not in own])
        base = spec.base_tree()
    except ForgetlessError as failure:
        raise RecipeError(f"{path}: {failure}{quoting_hint(str(failure), own)}") from None
    override_tree(base, [text for text in overrides if text not in own])
    return spec.model_copy(update={"base": base, "fixed": {}})


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _apply(tree: dict[str, Any], override: str) -> None:
    """As `apply_override`; behind `grid.` and `fixed.` stands one recipe key, dots and all."""
    part, _, key = _key(override).partition(".")
    if part not in ("grid", "fixed") or not key:
        apply_override(tree, override)
        return
    found: dict[str, Any] = {}
    apply_override(found, f"value={override.partition('=')[2]}")
    keys = tree.setdefault(part, {})
    if isinstance(keys, dict):
        keys[key] = found["value"]


def _refuse_varied(spec: SweepSpec, overrides: Sequence[str]) -> None:
    """Refuse to change what the sweep sets anyway: the change would be lost without a word."""
    for override in overrides:
        key = _key(override)
        if varied := _varied_by(spec, key):
            raise RecipeError(
                f"override {override!r}: expected a key that the sweep does not set itself, got "
                f"{key}, which it sets by {varied}; change it there, or give grid.{varied}=[…]"
            )


def _varied_by(spec: SweepSpec, key: str) -> str | None:
    """The varied key that sets `key`, itself or what it is a part of."""
    for varied in [*spec.grid, *(key for entry in spec.runs for key in entry)]:
        if varied == key or key.startswith(f"{varied}."):
            return varied
    return None


def sweep_schema() -> dict[str, Any]:
    """JSON schema of a sweep, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | (
        SweepSpec.model_json_schema()
    )
