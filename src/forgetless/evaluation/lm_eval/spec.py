"""Tasks of EleutherAI's lm-eval in a recipe: which, on which side, with how many examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from forgetless.data.validation import validated
from forgetless.errors import RecipeError
from forgetless.evaluation.results import Side


class LmEvalTask(BaseModel):
    """One task, tag or group of lm-eval.

    Attributes:
        task: Its name there, in `include_path`, or of a task that ships with forgetless
            (`nq_open_local`, `webqs_local`, `gsm8k_local`).
        side: Whether it is what was trained (`gain`) or what must be kept.
        name: Name in the record and the report; the task's where it is not given.
        num_fewshot: Solved examples before each question; the task's own number where not given.
        limit: The first rows only; of a group, of each of its tasks.
        data_files: JSON or JSONL file to ask from, or one file for each split of the task.
        chat_template: Whether prompts go through the tokenizer's chat template.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field(min_length=1)
    side: Side = "retention"
    name: str = ""
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    data_files: Path | dict[str, Path] | None = None
    chat_template: bool = False

    @property
    def label(self) -> str:
        """The name that figures stand under."""
        return self.name or self.task


def _named(entry: object) -> object:
    return {"task": entry} if isinstance(entry, str) else entry


class LmEvalRecipe(BaseModel):
    """What runs in lm-eval. A list of tasks alone means `{tasks: [...]}`.

    Attributes:
        tasks: Names, or mappings with the keys of `LmEvalTask`.
        include_path: A folder of task files (YAML) of your own.
        batch_size: Rows a forward pass.
        samples: Rows a task of which prompt and answers are kept; none by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[
        Annotated[LmEvalTask, BeforeValidator(_named, json_schema_input_type=str | LmEvalTask)]
    ] = Field(min_length=1)
    include_path: Path | None = None
    batch_size: int = Field(default=8, ge=1)
    samples: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _names_of_their_own(self) -> LmEvalRecipe:
        seen: set[str] = set()
        for task in self.tasks:
            if task.label in seen:
                raise ValueError(
                    f"expected a name for each task, got {task.label!r} twice; give one a `name`"
                )
            seen.add(task.label)
        return self


LmEvalInput = LmEvalRecipe | Mapping[str, Any] | Sequence[str | Mapping[str, Any] | LmEvalTask]


def parse_lm_eval(value: LmEvalInput | None, where: str = "lm_eval") -> LmEvalRecipe | None:
    """Tasks from a list, or from a mapping with `tasks` and the options of all.

    Returns:
        None where no task is named.

    Raises:
        RecipeError: An unknown key, two tasks of one name, or neither list nor mapping.
    """
    if value is None or isinstance(value, LmEvalRecipe):
        return value
    if isinstance(value, Mapping):
        return validated(LmEvalRecipe, dict(value), where)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RecipeError(
            f"{where}: expected a list of tasks, or a mapping with `tasks`, got "
            f"{type(value).__name__}; write [{value}]"
        )
    return validated(LmEvalRecipe, {"tasks": list(value)}, where) if value else None


def refuse_shared_names(settings: LmEvalRecipe | None, items: Sequence[str]) -> None:
    """Refuse a task that has the name of an evaluation item: figures stand under these.

    Raises:
        RecipeError: The name, and how to give the task another.
    """
    for task in settings.tasks if settings else ():
        if task.label in items:
            raise RecipeError(
                f"lm_eval: expected names apart from those of gain and retention, got "
                f"{task.label!r} in both; give the task a `name`"
            )
