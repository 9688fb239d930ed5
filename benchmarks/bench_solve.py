"""From stored moments to A0 and B0 of every layer, beside full SVDs and PEFT's CorDA.

    python benchmarks/bench_solve.py

Rank 32. Our solves are timed before, between and after the baselines, which take minutes, and
their medians count. The baselines do what published code does: a full SVD of each layer's moment
and one of the weight projected on the null space (LoRA-Null), or of each layer's output contrast
(SC-LoRA). The goals are a tenth of the baseline, and a fifth of PEFT's decomposition for CorDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from timing import Bench, demo_batches, loaded_demo
from torch import Tensor

from forgetless.adapters.start import seeds_of, solve_layers
from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.linalg.subspace import null_basis
from forgetless.methods import make_method
from forgetless.models.targets import Target, find_targets

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

RANK, BETA = 32, 0.8
TENTH, FIFTH, ENERGY = 0.1, 0.2, 0.01


def main() -> None:
    bench = Bench("solve", "Solving for A0 and B0 of all layers, rank 32")
    loaded = loaded_demo("float32")
    model, targets = loaded.model, find_targets(loaded.model).targets
    rows: dict[str, Any] = {"rows": 8, "length": 2048, "batch_size": 2}
    preserve = collect_moments(model, targets, demo_batches(loaded.tokenizer, **rows))
    train = collect_moments(model, targets, demo_batches(loaded.tokenizer, skip=30_000, **rows))
    moments: Any = {"preserve": preserve, "train": train}

    def solve(name: str) -> Callable[[], object]:
        method = make_method(name, RANK)
        asked = {role: moments[role] for role in method.needs}
        return partial(solve_layers, model, method, targets, asked, {}, seeds_of(targets, 0))

    names = ("lora-null", "sc-lora", "contrastive")
    rounds = [{name: timed(solve(name)) for name in names}]
    null_svd = timed(lambda: svds_of_moments(targets, preserve))
    null_svd_once = timed(lambda: svds_once_a_site(targets, preserve))
    rounds.append({name: timed(solve(name)) for name in names})
    contrast_svd = timed(lambda: svds_of_contrasts(targets, train, preserve))
    corda = timed(lambda: peft_corda(targets, preserve))
    rounds.append({name: timed(solve(name)) for name in names})
    seconds = {name: median(one[name] for one in rounds) for name in names}
    for what, took, reference, goal in (
        ("lora-null over full SVDs per layer", "lora-null", null_svd, TENTH),
        ("lora-null over full SVDs, one a site", "lora-null", null_svd_once, None),
        ("lora-null over PEFT's CorDA", "lora-null", corda, FIFTH),
        ("sc-lora over full SVDs per layer", "sc-lora", contrast_svd, TENTH),
        ("sc-lora over PEFT's CorDA", "sc-lora", corda, FIFTH),
        ("contrastive over PEFT's CorDA", "contrastive", corda, None),
    ):
        bench.add(
            what,
            ratio=seconds[took] / reference,
            seconds=seconds[took],
            reference_seconds=reference,
            **({} if goal is None else {"goal": goal}),
        )
    worst = max(excess(moment.mean_DD()) for moment in preserve.moments.values())
    bench.add("lora-null: energy over float64's optimum, less 1", ratio=worst, goal=ENERGY)
    bench.finish()


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def excess(moment_DD: Tensor) -> float:
    wide_DD = moment_DD.double()
    basis_DR = null_basis(moment_DD, RANK)[0].double()
    least = float(torch.linalg.eigvalsh(wide_DD)[:RANK].sum())
    return float(((wide_DD @ basis_DR) * basis_DR).sum()) / least - 1


def svds_of_moments(targets: Mapping[str, Target], found: SiteMoments) -> None:
    for name, target in targets.items():
        left_DD = torch.linalg.svd(found.of(name).mean_DD()).U
        project_by_svd(target, left_DD[:, -RANK:])


def svds_once_a_site(targets: Mapping[str, Target], found: SiteMoments) -> None:
    bases = {site: torch.linalg.svd(m.mean_DD()).U[:, -RANK:] for site, m in found.moments.items()}
    for name, target in targets.items():
        project_by_svd(target, bases[found.site_of[name]])


def project_by_svd(target: Target, null_DR: Tensor) -> None:
    weight_OD = target.weight_OD() @ null_DR @ null_DR.T
    left, sigma, right = torch.linalg.svd(weight_OD, full_matrices=False)
    root = sigma[:RANK].sqrt()
    _ = left[:, :RANK] * root, root[:, None] * right[:RANK]


def svds_of_contrasts(
    targets: Mapping[str, Target], train: SiteMoments, preserve: SiteMoments
) -> None:
    for name, target in targets.items():
        weight_OD = target.weight_OD()
        plus, minus = (weight_OD @ m.of(name).mean_DD() @ weight_OD.T for m in (train, preserve))
        contrast_OO = (1 - BETA) * plus / plus.trace() - BETA * minus / minus.trace()
        left_OO = torch.linalg.svd(contrast_OO).U
        _ = left_OO[:, :RANK].T @ weight_OD


def peft_corda(targets: Mapping[str, Target], found: SiteMoments) -> None:
    """PEFT's own decomposition, from the same moments."""
    from peft.tuners.lora.config import CordaConfig, LoraConfig
    from peft.tuners.lora.corda import collect_eigens_for_layer

    config = LoraConfig(r=RANK, corda_config=CordaConfig(corda_method="kpm"))
    for name, target in targets.items():
        layer = torch.nn.Linear(target.in_features, target.out_features, bias=False)
        layer.weight.data = target.weight_OD()
        layer.covariance_matrix = found.of(name).mean_DD()
        layer.corda_method, layer.rank = "kpm", RANK
        collect_eigens_for_layer(layer, config)


if __name__ == "__main__":
    main()
