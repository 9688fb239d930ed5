"""The YAML recipe of a run: what to train on what, how, and what to measure.

A recipe is read, overridden and checked as a whole before anything is loaded, so that a mistake in
its last line costs a second and not an hour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from forgetless.data.spec import DataSpec, SourceWeights, parse_data
from forgetless.data.validation import validated
from forgetless.errors import ForgetlessError, RecipeError
from forgetless.evaluation.items import EvaluationItem
from forgetless.evaluation.lm_eval.spec import (
    LmEvalRecipe,
    LmEvalTask,
    parse_lm_eval,
    refuse_shared_names,
)
from forgetless.evaluation.parse import parse_items
from forgetless.methods import make_any_method
from forgetless.recipe_yaml import apply_override, quoting_hint, read_yaml
from forgetless.training.regularisers import make_regularisers


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class CalibrationRecipe(_Part):
    """How second moments are collected.

    Attributes:
        source_weights: Of several sources: `tokens` counts every token once, `equal` every source.
        batch_size: Rows a forward pass; the moments do not depend on it.
        min_tokens: Kept tokens below which calibration is refused; the width of the widest site
            where it is not given, for methods that use bottom directions.
        memory_budget: Bytes, such as 8GiB, that second moments may take at a time; what is free
            where it is not given. Less memory takes more forward passes.
        cache: Whether moments are kept under their fingerprint and taken from there.
    """

    source_weights: SourceWeights = "tokens"
    batch_size: int = Field(default=8, ge=1)
    min_tokens: int | None = Field(default=None, ge=1)
    memory_budget: ByteSize | None = Field(default=None, ge=1)
    cache: bool = True


def _with_options(named: object) -> object:
    """A name as a mapping, in which options have a place."""
    return {"name": named} if isinstance(named, str) else named


def _known_regularisers(given: object) -> object:
    """Mappings of a name and options, from names or mappings, one or several."""
    listed = [given] if isinstance(given, str | dict) else given
    if not isinstance(listed, list | tuple):
        return given
    named = [_with_options(one) for one in listed]
    make_regularisers([one for one in named if isinstance(one, dict)])
    return named


_Options = dict[str, Any]
_Regularisers = Annotated[
    list[_Options],
    BeforeValidator(
        _known_regularisers, json_schema_input_type=str | _Options | list[str | _Options]
    ),
]


class TrainingRecipe(_Part):
    """How the adapter is trained.

    Attributes:
        learning_rate: Peak rate; the method's default where it is not given.
        epochs: Passes over the train data; `max_steps` overrides it.
        max_steps: Optimiser steps.
        batch_size: Rows a forward pass.
        gradient_accumulation: Forward passes an optimiser step.
        gradient_checkpointing: Less memory for more time.
        warmup_ratio: Fraction of the steps in which the rate rises from 0.
        weight_decay: Towards the base model; the method's default where it is not given.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        scheduler: The rate after warm-up.
        save_steps: Optimiser steps between checkpoints.
        logging_steps: Optimiser steps between logged losses.
        report_to: Integrations of transformers: `tensorboard`, `wandb`, …
        validation_rows: Rows held out of the train data for a validation NLL.
        bf16: Train under bf16 autocast; where not given, where the hardware is fast at it and
            `dtype` does not ask for float32.
        lora_plus_ratio: Rate of B over that of A (LoRA+); one rate for both where not given.
        regularisers: What else holds the model back while it trains: names, or mappings of a name
            and options, as `forgetless methods` lists them.
    """

    learning_rate: float | None = Field(default=None, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float | None = Field(default=None, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    save_steps: int = Field(default=50, ge=1)
    logging_steps: int = Field(default=5, ge=1)
    report_to: tuple[str, ...] = ()
    validation_rows: int = Field(default=0, ge=0)
    bf16: bool | None = None
    lora_plus_ratio: float | None = Field(default=None, gt=0)
    regularisers: _Regularisers = []

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, report_to: object) -> object:
        return (report_to,) if isinstance(report_to, str) else report_to


def _without_nul(folder: Path) -> Path:
    if "\0" in str(folder):
        raise RecipeError(
            f"output: expected the path of a folder, got {str(folder)!r}; no path holds the "
            "character NUL"
        )
    return folder


OutputFolder = Annotated[Path, AfterValidator(_without_nul)]

# What a list of items may hold in YAML; the model validator below makes items of all of it.
_Items = Annotated[
    list[EvaluationItem],
    BeforeValidator(lambda items: items, json_schema_input_type=list[str | EvaluationItem]),
]


_Tasks = Annotated[
    LmEvalRecipe | None,
    BeforeValidator(
        lambda tasks: tasks,
        json_schema_input_type=LmEvalRecipe | list[str | LmEvalTask] | None,
    ),
]


class EvaluationRecipe(_Part):
    """What is measured.

    Attributes:
        gain: Held-out data of the train task; metrics `nll` unless given.
        retention: Held-out data of what must be kept; metrics `nll` and `kl` unless given.
        lm_eval: Tasks of EleutherAI's lm-eval, `side: retention` unless given.
        scales: Factors on ΔW at which the same adapter is measured too, without generating. Not
            given: 0.25 and 0.5 for plain LoRA, the free baseline of every method; none for others.
        samples: Prompts an item for which base and tuned generations are kept.
    """

    gain: _Items = []
    retention: _Items = []
    lm_eval: _Tasks = None
    scales: list[Annotated[float, Field(gt=0)]] | None = None
    samples: int = Field(default=3, ge=0)

    @property
    def measures(self) -> bool:
        """Whether anything is measured at all."""
        return bool(self.gain or self.retention or self.lm_eval)

    @model_validator(mode="before")
    @classmethod
    def _make_items(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        gain, retention = (value.get(side) or [] for side in ("gain", "retention"))
        try:
            pairs = parse_items(gain, retention)
        except ForgetlessError as failure:
            raise RecipeError(f"evaluation.{failure}") from None
        sides = {side: [item for of, item in pairs if of == side] for side in ("gain", "retention")}
        harness = parse_lm_eval(value.get("lm_eval"), "evaluation.lm_eval")
        try:
            refuse_shared_names(harness, [item.name for _, item in pairs])
        except RecipeError as failure:
            raise RecipeError(f"evaluation.{failure}") from None
        return value | sides | {"lm_eval": harness}


def _parse_named(where: str) -> BeforeValidator:
    return BeforeValidator(
        lambda value: parse_data(value, strings="spec", where=where),
        json_schema_input_type=str | DataSpec | list[str | DataSpec],
    )


def _known_method(method: object) -> object:
    """A mapping of a name and options, from either."""
    options = _with_options(method)
    if isinstance(options, dict):
        make_any_method(options)
    return options


class Recipe(_Part):
    """One run.

    Attributes:
        model: Hub id, path, or `demo`.
        revision: Commit or tag of a hub model.
        trust_remote_code: Whether code that comes with a model may run.
        dtype: Of the base model; `auto` is what the hardware is good at.
        quantization: How to quantise the base's linear layers below the head while it is loaded;
            `none` leaves the checkpoint as it is, which may be quantised already.
        device: Where it runs; `auto` is one GPU, else MPS, else the CPU.
        method: `name` and options, as `forgetless methods` lists them; a name alone will do.
        train_data: What to learn.
        preserve_data: What must not be forgotten.
        targets: Patterns of layer names; every linear layer but the head where not given.
        calibration: How second moments are collected.
        training: How the adapter is trained.
        evaluation: What is measured.
        seed: Of everything that is drawn, but for the data, which have their own.
        output: Folder of the run.
        label: Name in reports; the method's where it is not given.
        claims: Whether a report may say who did better; a try with a few rows may not.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4", "int8", "torchao-int8"] = "none"
    device: str = "auto"
    method: Annotated[
        _Options, BeforeValidator(_known_method, json_schema_input_type=str | _Options)
    ]
    train_data: Annotated[list[DataSpec], _parse_named("train_data")] = Field(min_length=1)
    preserve_data: Annotated[list[DataSpec], _parse_named("preserve_data")] = []
    targets: list[str] | None = None
    calibration: CalibrationRecipe = CalibrationRecipe()
    training: TrainingRecipe = TrainingRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    seed: int = Field(default=0, ge=0)
    output: OutputFolder
    label: str | None = None
    claims: bool = True

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_several(cls, targets: object) -> object:
        return [targets] if isinstance(targets, str) else targets

    @model_validator(mode="after")
    def _data_that_the_method_needs(self) -> Self:
        method = make_any_method(self.method)
        if "preserve" in method.needs and not self.preserve_data:
            raise RecipeError(
                f"preserve_data: expected data, as the method {self.method['name']} calibrates on "
                "it, got none; name what must be kept, or `preserve_data: self`"
            )
        for regulariser in make_regularisers(self.training.regularisers):
            if regulariser.needs_preserve and not self.preserve_data:
                raise RecipeError(
                    f"preserve_data: expected data, as the regulariser {regulariser.name} needs "
                    "it, got none; name what must be kept, or `preserve_data: self`"
                )
            regulariser.check_form(method.form)
        return self

    @model_validator(mode="after")
    def _what_needs_an_adapter(self) -> Self:
        if make_any_method(self.method).form != "full":
            return self
        given = {
            "targets": self.targets,
            "training.lora_plus_ratio": self.training.lora_plus_ratio,
            "quantization": None if self.quantization == "none" else self.quantization,
        }
        for key, value in given.items():
            if value is not None:
                raise RecipeError(
                    f"{key}: expected none with method full, which trains every weight of a "
                    f"full-precision model, got {value}; leave it out"
                )
        return self

    def resolved(self) -> dict[str, Any]:
        """All keys with all defaults as plain values; it loads as the same recipe."""
        return self.model_dump(mode="json", by_alias=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check all of it.

    Paths in it are relative to the working directory.

    Args:
        path: A YAML file.
        overrides: `key.path=value` with a YAML value; list entries by number:
            `evaluation.gain.0.limit=10`.

    Raises:
        RecipeError: The file, an override or a key is wrong: one line that names the key path.
    """
    path = Path(path)
    tree = read_yaml(path)
    override_tree(tree, overrides)
    try:
        return validated(Recipe, tree)
    except ForgetlessError as failure:
        raise RecipeError(f"{path}: {failure}{quoting_hint(str(failure), overrides)}") from None


def override_tree(tree: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    """Apply overrides to what a recipe's file holds, in place.

    Raises:
        RecipeError: As `apply_override` does.
    """
    give_options_a_place(tree)
    for override in overrides:
        apply_override(tree, override)
        give_options_a_place(tree)


def give_options_a_place(tree: dict[str, Any]) -> None:
    """Write names as mappings, so that `method.rank=16` has a place."""
    if "method" in tree:
        tree["method"] = _with_options(tree["method"])
    training = tree.get("training")
    if isinstance(training, dict) and isinstance(training.get("regularisers"), list):
        training["regularisers"] = [*map(_with_options, training["regularisers"])]


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()
