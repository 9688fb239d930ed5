"""The start of every layer of a new adapter: the method's solve, in the form that holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from forgetless.adapters.forms import FORMS, adapted_layers
from forgetless.adapters.start_store import StoredStarts
from forgetless.calibration.engine import SiteMoments
from forgetless.calibration.gradients import collect_gradients
from forgetless.data.rows import RowSet
from forgetless.data.tokens import make_batches, pad_token_id, tokenize
from forgetless.errors import AdapterError, MethodError
from forgetless.methods.base import AdapterInit, LayerWeights, Method, Role, SiteStatistics
from forgetless.models.targets import Target


@dataclass(frozen=True, slots=True)
class LayerStart:
    """What the method found at one layer."""

    site: str
    rank: int
    diagnostics: dict[str, float]


def start_layers(
    model: PeftModel,
    method: Method,
    targets: Mapping[str, Target],
    moments: Mapping[Role, SiteMoments],
    gradients: Mapping[str, Tensor],
    adapter: str,
    seed: int,
    cache: Path | None = None,
) -> dict[str, LayerStart]:
    """Solve layer by layer and fill the adapter's tensors, each layer with a seed of its own.

    With a `cache` what was solved from the same base, data and options before is taken from there;
    what a method only draws is not kept.

    Raises:
        AdapterError: PEFT has adapted other layers than the targets; a layer's weights are not
            finite.
        MethodError: Data that the method needs are missing.
    """
    layers = adapted_layers(model, adapter)
    if set(layers) != set(targets):
        odd = sorted(set(layers) ^ set(targets))[0]
        raise AdapterError(f"adapter: PEFT and the target list disagree about layer {odd}")
    solved = _solved(method, targets, moments, gradients, seed)
    if cache is not None and not method.draws:
        stored = StoredStarts(cache, model, method, targets, moments, gradients)
        solved = iter(stored.kept(lambda: dict(solved)).items())
    form = FORMS[method.form]
    starts = {}
    for name, init in solved:
        form.start(layers[name], adapter, init)
        site = next((found.site_of[name] for found in moments.values()), name)
        starts[name] = LayerStart(site, method.rank, dict(init.diagnostics))
    return starts


def _solved(
    method: Method,
    targets: Mapping[str, Target],
    moments: Mapping[Role, SiteMoments],
    gradients: Mapping[str, Tensor],
    seed: int,
) -> Iterator[tuple[str, AdapterInit]]:
    """Layer by layer, so that no two need to be held at a time."""
    for position, (name, target) in enumerate(targets.items()):
        stats = SiteStatistics(
            **{role: found.of(name) for role, found in moments.items()},
            gradient_OD=gradients.get(name),
        )
        generator = torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)
        yield name, method.init(_where_it_can_be_solved(name, target), stats, generator)


def _where_it_can_be_solved(name: str, target: Target) -> LayerWeights:
    """Weights where the eigensolvers run: torch has none on MPS. Moments follow the weights.

    The solvers fail over NaN without a word of the layer, and a method that only draws would not
    notice.
    """
    weight_OD, bias_O = target.weight_OD(), target.bias_O()
    if not (weight_OD.isfinite().all() and (bias_O is None or bias_O.isfinite().all())):
        raise AdapterError(
            f"layer {name}: expected finite weights, got NaN or inf; fetch the base model again"
        )
    if weight_OD.device.type != "mps":
        return LayerWeights(name, weight_OD, bias_O)
    return LayerWeights(name, weight_OD.cpu(), None if bias_O is None else bias_O.cpu())


def first_gradient(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    targets: Mapping[str, Target],
    row_sets: Sequence[RowSet],
    batch_size: int,
) -> dict[str, Tensor]:
    """On the first train rows, ended as they are trained."""
    rows = [row for rows in row_sets for row in tokenize(rows, tokenizer, append_eos=True)]
    if not rows:
        raise MethodError(f"method {method.name} needs train data, got none: give train_data")
    batches = make_batches(
        rows[: method.rows_for_gradient],
        batch_size=batch_size,
        pad_token_id=pad_token_id(tokenizer),
        tokens="completion",
    )
    return collect_gradients(model, targets, batches)
