"""The start of every layer of a new adapter: the method's solve, in the form that holds it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from forgetless.processes import ALONE, Processes


@dataclass(frozen=True, slots=True)
class LayerStart:
    """What the method found at one layer."""

    site: str
    rank: int
    diagnostics: dict[str, float]


def solve_layers(
    model: nn.Module,
    method: Method,
    targets: Mapping[str, Target],
    moments: Mapping[Role, SiteMoments],
    gradients: Mapping[str, Tensor],
    seeds: Mapping[str, int],
    cache: Path | None = None,
    processes: Processes = ALONE,
) -> dict[str, AdapterInit]:
    """A0 and B0 of every target, in each of the processes that divide the sites among them.

    With a `cache` what was solved from the same base, data and options before is taken from there;
    what a method only draws is not kept.

    Args:
        model: The base, or a PeftModel.
        method: What solves.
        targets: Layers, whose moments and gradients are there.
        moments: By role.
        gradients: By layer, for the methods that ask.
        seeds: By layer.
        cache: Folder to keep starts in.
        processes: That solve together, from the same moments.

    Raises:
        AdapterError: A layer's weights are not finite.
        MethodError: Data that the method needs are missing.
    """
    solve = partial(_solve, method, targets, moments, gradients, seeds, processes)
    if cache is None or method.draws:
        return solve()
    stored = StoredStarts(cache, model, method, targets, moments, gradients)
    return stored.kept(solve, processes)


def seeds_of(targets: Iterable[str], seed: int) -> dict[str, int]:
    """A seed of its own for each layer."""
    return {name: (seed * 1_000_003 + i) % 2**63 for i, name in enumerate(targets)}


def fill_layers(
    model: PeftModel,
    method: Method,
    adapter: str,
    solved: Mapping[str, AdapterInit],
    site_of: Mapping[str, str],
) -> dict[str, LayerStart]:
    """Put what was solved into the adapter's tensors.

    Raises:
        AdapterError: PEFT has adapted other layers.
    """
    layers = adapted_layers(model, adapter)
    if set(layers) != set(solved):
        odd = sorted(set(layers) ^ set(solved))[0]
        raise AdapterError(f"adapter: PEFT and the target list disagree about layer {odd}")
    starts = {}
    for name, init in solved.items():
        FORMS[method.form].start(layers[name], adapter, init)
        starts[name] = LayerStart(site_of.get(name, name), method.rank, dict(init.diagnostics))
    _warn_of_chance(starts)
    return starts


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


def _solve(
    method: Method,
    targets: Mapping[str, Target],
    moments: Mapping[Role, SiteMoments],
    gradients: Mapping[str, Tensor],
    seeds: Mapping[str, int],
    processes: Processes,
) -> dict[str, AdapterInit]:
    """Each process solves at some sites, of about the same cost in all, and hears of the rest."""
    by_site: dict[str, list[str]] = {}
    for name in targets:
        site = next((found.site_of[name] for found in moments.values()), name)
        by_site.setdefault(site, []).append(name)
    mine = processes.shares({site: _cost(targets, names) for site, names in by_site.items()})
    own = {site: by_site[site] for site in mine[processes.rank]}
    with processes.together():
        solved = dict(_solved(method, targets, moments, gradients, seeds, own))
    if processes.count > 1:
        solved = _of_all(solved, targets, processes)
    return solved


def _cost(targets: Mapping[str, Target], names: Sequence[str]) -> float:
    """About what a site takes: its moment is factored, and multiplied with each layer's weight."""
    width = targets[names[0]].in_features
    return float(width**2 * (width + sum(targets[name].out_features for name in names)))


def _of_all(
    own: Mapping[str, AdapterInit], targets: Mapping[str, Target], processes: Processes
) -> dict[str, AdapterInit]:
    """What all processes have solved, in the order of the targets."""
    facts = {
        name: (init.a_RD.shape, init.b_OR.shape, init.a_RD.dtype, init.b_OR.dtype, init.diagnostics)
        for name, init in own.items()
    }
    found: dict[str, AdapterInit] = {}
    for rank, solved in enumerate(processes.each(facts)):
        for name, (a_shape, b_shape, a_dtype, b_dtype, diagnostics) in solved.items():
            if rank == processes.rank:
                a_RD, b_OR = own[name].a_RD.contiguous(), own[name].b_OR.contiguous()
            else:
                device = _where_it_can_be_solved(targets[name].weight_OD().device)
                a_RD = torch.empty(a_shape, dtype=a_dtype, device=device)
                b_OR = torch.empty(b_shape, dtype=b_dtype, device=device)
            processes.send_(a_RD, rank)
            processes.send_(b_OR, rank)
            found[name] = AdapterInit(a_RD, b_OR, diagnostics)
    return {name: found[name] for name in targets}


def _solved(
    method: Method,
    targets: Mapping[str, Target],
    moments: Mapping[Role, SiteMoments],
    gradients: Mapping[str, Tensor],
    seeds: Mapping[str, int],
    by_site: Mapping[str, Sequence[str]],
) -> Iterator[tuple[str, AdapterInit]]:
    """Site by site, so that what its layers share is solved once and no two need to be held."""
    for site, names in by_site.items():
        device = _where_it_can_be_solved(targets[names[0]].weight_OD().device)
        here = {role: found.of(names[0]).to(device) for role, found in moments.items()}
        stats = SiteStatistics(train=here.get("train"), preserve=here.get("preserve"))
        stats = replace(stats, basis=method.site_basis(site, stats))
        for name in names:
            of_layer = replace(stats, gradient_OD=gradients.get(name))
            generator = torch.Generator().manual_seed(seeds[name])
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
