"""What a recipe's regularisers need of its preserve data."""

from __future__ import annotations

from collections.abc import Mapping

from forgetless.calibration.engine import SiteMoments
from forgetless.data.tokens import tokenize
from forgetless.experiments.prepare import Prepared
from forgetless.methods.base import Role
from forgetless.models.load import LoadedModel
from forgetless.recipe import Recipe
from forgetless.training.regularisers import make_regularisers
from forgetless.training.regularisers.base import PreserveData


def calibrated_for(recipe: Recipe) -> frozenset[Role]:
    """Roles to collect moments of for the regularisers."""
    wanted = any(one.needs_moments for one in make_regularisers(recipe.training.regularisers))
    return frozenset({"preserve"}) if wanted else frozenset()


def uses_preserve(recipe: Recipe) -> bool:
    """Whether a regulariser reads preserve data."""
    return any(one.needs_preserve for one in make_regularisers(recipe.training.regularisers))


def preserve_data(
    recipe: Recipe,
    loaded: LoadedModel,
    data: Prepared,
    moments: Mapping[Role, SiteMoments],
) -> PreserveData:
    """Moments and rows to keep; rows to train on end as train rows do, sampled ones as they are."""
    trained = any(one.trains_on_rows for one in make_regularisers(recipe.training.regularisers))
    to_train_on = [
        row
        for rows in data.preserve
        if trained
        for row in tokenize(rows, loaded.tokenizer, append_eos=not rows.spec.self_sampled)
    ]
    return PreserveData(moments.get("preserve"), data.preserve_rows, to_train_on)
