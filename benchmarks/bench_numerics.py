"""Errors of second moments and of the solve, at every site of the demo model, against float64.

    python benchmarks/bench_numerics.py

The reference of a moment is the float64 sum of the very activations that were summed. `float16` is
what must not be done: products and sums in half precision, as in code published with a paper.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from timing import Bench, demo_batches, loaded_demo
from torch import Tensor

from forgetless.calibration.hooks import base_forward, observe_sites
from forgetless.linalg.moments import SecondMoment
from forgetless.linalg.subspace import null_basis, rounding_of
from forgetless.models.targets import find_targets

# Shape letters in this file: N = tokens, D = width of a site.

RANK = 32
ERROR = "relative error of the moment"
LEAKAGE = "energy of the null space over the least, less 1"
DETERMINED = f"{LEAKAGE}, where no direction is below the rounding"
LENGTH, ROWS = 512, 16  # 8192 tokens: five times the widest site


def main() -> None:
    bench = Bench("numerics", "Errors against float64, over all sites")
    for dtype in ("float32", "bfloat16"):
        for kind, figures in measure(dtype).items():
            for what, values in figures.items():
                bench.add(f"{dtype} activations, {kind}: {what}", **spread(values))
    bench.finish()


def spread(values: list[float]) -> dict[str, float]:
    known = [value for value in values if np.isfinite(value)]
    figures = {"median": float(np.median(known)), "worst": float(np.max(known))}
    if len(known) < len(values):
        figures["sites_overflown"] = float(len(values) - len(known))
    figures["sites"] = float(len(values))
    return figures


def measure(dtype: str) -> dict[str, dict[str, list[float]]]:
    """By way of summing: relative Frobenius error, and excess energy of its null space."""
    exact, ours, bad = collect(dtype)
    chance = {site: undetermined(moment.float()) for site, moment in ours.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for kind, moments in (("float32 sums", ours), ("float16 sums", bad)):
        rows = found[kind] = {name: [] for name in (ERROR, LEAKAGE, DETERMINED)}
        for site, moment in moments.items():
            reference = exact[site]
            rows[ERROR].append(float((moment - reference).norm() / reference.norm()))
            rows[LEAKAGE].append(excess(moment, reference))
            if not chance[site]:
                rows[DETERMINED].append(rows[LEAKAGE][-1])
    solve = found["the solve alone"] = {LEAKAGE: [], "condition number": []}
    for site, moment in ours.items():
        single = moment.float()
        solve[LEAKAGE].append(excess(single.double(), single.double()))
        values = torch.linalg.eigvalsh(exact[site])
        solve["condition number"].append(float(values[-1] / values[0].abs()))
    found["sites"] = {"directions of 32 below the rounding": [float(n) for n in chance.values()]}
    return found


def undetermined(moment: Tensor) -> int:
    """How many directions of its null space carry less than its rounding."""
    return int((null_basis(moment, RANK)[1] < rounding_of(moment)).sum())


def excess(moment: Tensor, reference: Tensor) -> float:
    """What the null space found in one moment holds in another, over the least possible, less 1."""
    if not bool(moment.isfinite().all()):
        return float("inf")
    basis = null_basis(moment.float(), RANK)[0].double()
    least = float(torch.linalg.eigvalsh(reference)[:RANK].sum())
    return float(((reference @ basis) * basis).sum()) / least - 1


def add_in_half(sum_DD: Tensor, x_ND: Tensor) -> None:
    sum_DD += (x_ND.half().T @ x_ND.half()) / (LENGTH * ROWS)


def collect(dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Means by site: in float64, as the package sums, and in half precision."""
    loaded = loaded_demo(dtype)
    targets = find_targets(loaded.model).targets
    exact: dict[str, Tensor] = {}
    ours: dict[str, SecondMoment] = {}
    bad: dict[str, Tensor] = {}

    def observe(site: str, x: Tensor) -> None:
        x_ND = x.reshape(-1, x.shape[-1])
        D = x_ND.shape[1]
        if site not in exact:
            exact[site] = torch.zeros(D, D, dtype=torch.float64)
            ours[site] = SecondMoment.zeros(D)
            bad[site] = torch.zeros(D, D, dtype=torch.float16)
        exact[site] += x_ND.double().T @ x_ND.double()
        ours[site].add_(x_ND)
        add_in_half(bad[site], x_ND)

    with (
        base_forward(loaded.model) as decoder,
        observe_sites(loaded.model, targets, observe) as sites,
    ):
        for batch in batches(loaded.tokenizer):
            decoder(input_ids=batch, use_cache=False)
            sites.forget_tensors()
    tokens = LENGTH * ROWS
    return (
        {site: total / tokens for site, total in exact.items()},
        {site: moment.mean_DD().double() for site, moment in ours.items()},
        {site: (total.double() + total.double().T) / 2 for site, total in bad.items()},
    )


def batches(tokenizer: object) -> Iterator[Tensor]:
    for batch in demo_batches(tokenizer, rows=ROWS, length=LENGTH, batch_size=4):
        yield batch.input_ids_BT


if __name__ == "__main__":
    main()
