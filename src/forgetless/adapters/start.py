"""The start of every layer of a new adapter: the method's solve, in the form that holds it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from forgetless.errors import AdapterError, ForgetlessWarning, MethodError
from forgetless.methods.base import (
    UNDETERMINED,
    AdapterInit,
    LayerWeights,
    Method,
    Role,
    SiteStatistics,
)
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
        starts[name] = LayerStart(_site(name, moments), method.rank, dict(init.diagnostics))
    _warn_of_chance(starts)
    return {name: starts[name] for name in targets}


def _site(name: str, moments: Mapping[Role, SiteMoments]) -> str:
    return next((found.site_of[name] for found in moments.values()), name)


def _warn_of_chance(starts: Mapping[str, LayerStart]) -> None:
    """Say where rounding alone picked directions of a null space."""
    found = {s.site: int(s.diagnostics.get(UNDETERMINED, 0)) for s in starts.values()}
    chance = {site: count for site, count in found.items() if count}
    if chance:
        site, count = max(chance.items(), key=lambda item: item[1])
        warnings.warn(
            f"start: at {len(chance)} of {len(found)} sites, most at {site}, rounding alone picks "
            f"some directions of the null space ({count} of {starts[site].rank} there): preserve "
            "data use them less than the float32 sums can tell. They keep these data as well as "
            "any; where others matter that use them, give more rows of more kinds",
            ForgetlessWarning,
            stacklevel=3,
        )


def _solved(
    method: Method,
    targets: Mapping[str, Target],
    moments: Mapping[Role, SiteMoments],
    gradients: Mapping[str, Tensor],
    seed: int,
) -> Iterator[tuple[str, AdapterInit]]:
    """Site by site, so that what its layers share is solved once and no two need to be held."""
    position = {name: index for index, name in enumerate(targets)}
    by_site: dict[str, list[str]] = {}
    for name in targets:
        by_site.setdefault(_site(name, moments), []).append(name)
    for site, names in by_site.items():
        device = _where_it_can_be_solved(targets[names[0]].weight_OD().device)
        here = {role: found.of(names[0]).to(device) for role, found in moments.items()}
        stats = SiteStatistics(train=here.get("train"), preserve=here.get("preserve"))
        stats = replace(stats, basis=method.site_basis(site, stats))
        for name in names:
            of_layer = replace(stats, gradient_OD=gradients.get(name))
            generator = torch.Generator().manual_seed((seed * 1_000_003 + position[name]) % 2**63)
            yield name, method.init(_weights(name, targets[name], device), of_layer, generator)


def _where_it_can_be_solved(device: torch.device) -> torch.device:
    """Where the eigensolvers run: torch has none on MPS."""
    return torch.device("cpu") if device.type == "mps" else device


def _weights(name: str, target: Target, device: torch.device) -> LayerWeights:
    """Weight and bias on a device.

    The solvers fail over NaN without a word of the layer, and a method that only draws would not
    notice.
    """
    weight_OD, bias_O = target.weight_OD().to(device), target.bias_O()
    if not (weight_OD.isfinite().all() and (bias_O is None or bias_O.isfinite().all())):
        raise AdapterError(
            f"layer {name}: expected finite weights, got NaN or inf; fetch the base model again"
        )
    return LayerWeights(name, weight_OD, None if bias_O is None else bias_O.to(device))


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
