"""What can be checked of a recipe in a moment, before hours are spent on it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from forgetless.adapters.peft_layers import refuse_unholdable
from forgetless.data.loading import check_rows
from forgetless.data.overlap import refuse_overlap
from forgetless.data.rows import RowSet
from forgetless.data.spec import DataSpec
from forgetless.errors import MethodError, ModelError, RecipeError
from forgetless.evaluation.items import EvaluationItem
from forgetless.evaluation.lm_eval.files import task_files
from forgetless.evaluation.lm_eval.tasks import open_tasks
from forgetless.methods.base import AnyMethod, Method
from forgetless.models.load import LoadedModel
from forgetless.models.targets import find_targets
from forgetless.recipe import Recipe

_ANYWHERE = frozenset({"all", "none"})


def check_before_loading(recipe: Recipe) -> None:
    """Refuse data that cannot be used and loggers that are not there.

    Raises:
        DataError: A path that does not exist, a row that cannot be read or rendered, or one in two
            roles. Rows of `self`, of the hub and of chat messages are rendered later.
        RecipeError: `training.report_to` names no logger that is installed.
    """
    refuse_overlap(
        {
            "train": check_readable(recipe.train_data, needs_completion=True),
            "preserve": check_readable(recipe.preserve_data),
            "evaluation": check_readable(items_of(recipe)),
        }
    )
    for name in recipe.training.report_to:
        _check_logger(name)


def check_tasks(recipe: Recipe, *, allow_task_code: bool = False) -> None:
    """Open all tasks of lm-eval: unknown ones, code and missing data are told before hours pass.

    Raises:
        RecipeError: As `open_tasks` does.
    """
    if recipe.evaluation.lm_eval is not None:
        names = [item.name for item in [*recipe.evaluation.gain, *recipe.evaluation.retention]]
        open_tasks(recipe.evaluation.lm_eval, taken=names, allow_code=allow_task_code)


def check_readable(specs: Sequence[DataSpec], *, needs_completion: bool = False) -> list[RowSet]:
    """Read what can be read without a model; the rows that need no chat template.

    Raises:
        DataError: A path that does not exist, or a row that cannot be read or rendered.
    """
    return [
        check_rows(
            spec,
            needs_completion=spec.needs_completion
            if isinstance(spec, EvaluationItem)
            else needs_completion,
        )
        for spec in specs
    ]


def check_layers(recipe: Recipe, method: AnyMethod, loaded: LoadedModel) -> None:
    """Refuse targets that the model does not have, and ranks that its layers cannot hold.

    Raises:
        AdapterError: A pattern that matches no layer, or the output head; a layer that cannot hold
            the method's adapter.
        ModelError: One that could not be saved once its weights are trained.
        MethodError: A layer that the method cannot start on, or a quantised base of which every
            weight is to be trained.
    """
    targets = find_targets(loaded.model, recipe.targets).targets
    if not isinstance(method, Method):
        if loaded.quantization is not None:
            raise MethodError(
                f"method {method.name}: expected a full-precision base, as every weight trains, "
                f"got {loaded.name} quantised ({loaded.quantization}); load it in full precision, "
                "or take a method that trains an adapter"
            )
        _refuse_unsavable(loaded)
        return
    for target in targets.values():
        method.check_layer(target.name, target.in_features, target.out_features)
    refuse_unholdable(loaded.model, method, targets)


def _refuse_unsavable(loaded: LoadedModel) -> None:
    """Transformers saves no model with generation settings that it finds at odds."""
    if loaded.model.generation_config is None:
        return
    try:
        loaded.model.generation_config.validate(strict=True)
    except ValueError as error:
        last = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"model {loaded.name}: expected generation settings that transformers saves with a "
            f"trained model, got some that it refuses ({last}); mend its generation_config.json"
        ) from error


def data_of(recipe: Recipe) -> list[DataSpec]:
    """Specs of what the adapter is made from."""
    return [*recipe.train_data, *recipe.preserve_data]


def items_of(recipe: Recipe) -> list[DataSpec]:
    """Specs of what is measured."""
    return [*recipe.evaluation.gain, *recipe.evaluation.retention]


def measured_files(recipe: Recipe) -> list[DataSpec]:
    """All that figures are measured on, by path: items, and files of lm-eval tasks."""
    files = task_files(recipe.evaluation.lm_eval)
    return [*items_of(recipe), *(DataSpec(path=path) for path in files)]


def _check_logger(name: str) -> None:
    if name in _ANYWHERE:
        return
    if name not in INTEGRATION_TO_CALLBACK:
        near = difflib.get_close_matches(name, list(INTEGRATION_TO_CALLBACK), n=1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out to log nowhere else"
        raise RecipeError(
            f"training.report_to: expected one of {', '.join(INTEGRATION_TO_CALLBACK)}, got "
            f"{name!r}; {remedy}"
        )
    # transformers has no check for flyte.
    if name != "flyte" and name not in get_available_reporting_integrations():
        raise RecipeError(
            f"training.report_to: expected a logger that is installed, got {name!r}; install its "
            "package, or leave it out"
        )
