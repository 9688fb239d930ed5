"""The base model that a recipe names, loaded and announced."""

from __future__ import annotations

from forgetless.experiments.describe import dtype_name
from forgetless.experiments.progress import Progress
from forgetless.models.load import LoadedModel, load_model
from forgetless.recipe import Recipe


def load_base(recipe: Recipe, progress: Progress) -> LoadedModel:
    """Load the recipe's model, and tell where it runs and in which precision.

    Raises:
        ModelError: It cannot be found or loaded, or is no causal language model.
    """
    loaded = load_model(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        quantization=recipe.quantization,
    )
    quantised = f", quantised: {loaded.quantization}" if loaded.quantization else ""
    progress.note(
        f"model {loaded.name} on {loaded.device} in {dtype_name(loaded.dtype)}{quantised}"
    )
    return loaded
