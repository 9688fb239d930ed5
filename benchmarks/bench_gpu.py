"""Calibration and solve at the size of Llama-3-8B on one GPU, each step beside its arithmetic.

    python benchmarks/bench_gpu.py [--tiny]

A model of that shape with random weights in bfloat16, built on the GPU: nothing is downloaded. The
RMSNorm weights fall by a power law, so that the spectra of the moments do, as in a trained model.
256 x 2048 tokens for each role, drawn by Zipf's law with a ranking of its own; rank 128. Says so
and ends where there is no GPU; `--tiny` runs the same steps at a small size anywhere.

A floor is what the arithmetic of a step takes at the rate of one large matrix product of its dtype,
measured here: forward 2 · parameters · tokens, moments D² · tokens a site (xᵀ x is symmetric), a
Cholesky factor D³ / 3.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timing import Bench
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forgetless.adapters.start import seeds_of, solve_layers
from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.calibration.memory import SOLVE_MATRICES, plan_calibration
from forgetless.data.tokens import Batch
from forgetless.linalg.precision import full_precision
from forgetless.methods import make_method
from forgetless.models.targets import Target, find_targets

# Shape letters in this file: B = rows, T = positions, D = layer input width.

GB = 10**9
AIM_SECONDS = 90
BUDGET_GB = 24


@dataclass(frozen=True)
class Size:
    """What is built and run.

    Attributes:
        config: Options of LlamaConfig.
        rows, length, batch_size: Of the tokens.
        budget_rows: Of these, for the runs under the memory budget, whose passes are many.
        rank: R.
        corda_layers, corda_rows, corda_seconds: PEFT's CorDA is run on so much, so long.
        product: Width of the products that rates are measured on.
    """

    config: Mapping[str, int]
    rows: int = 256
    length: int = 2048
    batch_size: int = 8
    budget_rows: int = 16
    rank: int = 128
    corda_layers: int = 8
    corda_rows: int = 16
    corda_seconds: float = 75
    product: int = 8192


LLAMA = Size(
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
    }
)
TINY = Size(
    {
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "max_position_embeddings": 256,
    },
    rows=16,
    length=64,
    budget_rows=8,
    rank=4,
    corda_layers=1,
    corda_rows=4,
    corda_seconds=5,
    product=256,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small size, on any machine")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        print("\nbench_gpu: no GPU here, not run (--tiny runs its steps anywhere)")
        return
    size = TINY if tiny else LLAMA
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench("gpu-tiny" if tiny else "gpu", "Llama-3-8B's shape, bfloat16, rank 128")
    try:
        run(bench, size, device)
    finally:
        bench.finish()


def run(bench: Bench, size: Size, device: torch.device) -> None:
    model = built(size, device)
    targets = find_targets(model).targets
    rates = {dtype: rate(size.product, dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    bench.add(
        "the machine",
        **{
            f"{str(dtype).removeprefix('torch.')}_tflops": flops / 1e12
            for dtype, flops in rates.items()
        },
        model_gb=sum(p.numel() * p.element_size() for p in model.parameters()) / GB,
    )
    floors = Floors(model, targets, size, rates)
    batches = {role: random_batches(size, seed) for seed, role in enumerate(("preserve", "train"))}
    bare(model, batches["preserve"][:2], device)  # warms up
    collect_moments(model, targets, batches["preserve"][:2])

    seconds = {}
    with measured(device) as of:
        bare(model, batches["preserve"], device)
    bench.add("forward without head", **of.figures(floors.forward()))
    forward = of.seconds
    moments: dict[str, SiteMoments] = {}
    for role, some in batches.items():
        with measured(device) as of:
            moments[role] = collect_moments(model, targets, some)
        seconds[role] = of.seconds
        floor = floors.forward() + floors.moments()
        bench.add(f"calibration on {role} data", ratio=of.seconds / forward, **of.figures(floor))
    bench.add("error of a moment, relative", **error_of_a_moment(model, targets, size))

    for name in ("lora-null", "sc-lora"):
        method = make_method(name, size.rank)
        asked: Any = {role: moments[role] for role in method.needs}
        with measured(device) as of:
            solve_layers(model, method, targets, asked, {}, seeds_of(targets, 0))
        seconds[name] = of.seconds
        floor = floors.factors() if name == "lora-null" else floors.contrasts()
        bench.add(f"{name}: solve", **of.figures(floor))
    del moments, asked
    free(device)
    for name, roles in (("lora-null", ("preserve",)), ("sc-lora", ("preserve", "train"))):
        total = seconds[name] + sum(seconds[role] for role in roles)
        bench.add(
            f"{name}: calibration and solve", seconds=total, ratio=total / AIM_SECONDS, goal=1
        )

    few = {role: some[: size.budget_rows // size.batch_size] for role, some in batches.items()}
    for name in ("lora-null", "sc-lora"):
        with measured(device) as one:
            for role in make_method(name, size.rank).needs:
                collect_moments(model, targets, few[role])
        with measured(device) as of:
            passes = in_groups(model, targets, name, few, size, device)
        bench.add(
            f"{name} within {BUDGET_GB} GB, {size.budget_rows} rows, over one pass",
            ratio=of.seconds / (one.seconds + seconds[name]),
            passes=passes,
            **of.figures(),
        )

    corda(bench, model, batches["preserve"], size, device)


def built(size: Size, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(**size.config, dtype=torch.bfloat16, rope_theta=500_000.0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    width = config.hidden_size
    law_D = torch.arange(1, width + 1, dtype=torch.float64).pow(-0.75)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            order = torch.randperm(width, generator=generator)
            parameter.data.copy_(law_D[order] * (width / law_D.square().sum()) ** 0.5)
    return model.requires_grad_(False)


def random_batches(size: Size, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    words = size.config["vocab_size"]
    ranking = torch.randperm(words, generator=generator)
    frequency = 1 / torch.arange(1, words + 1, dtype=torch.float64)
    found = []
    for start in range(0, size.rows, size.batch_size):
        shape = (min(size.batch_size, size.rows - start), size.length)
        ids = frequency.multinomial(shape[0] * shape[1], replacement=True, generator=generator)
        ids_BT = ranking[ids].reshape(shape)
        every_BT = torch.ones(shape, dtype=torch.int64)
        index = tuple(range(start, start + shape[0]))
        found.append(Batch(ids_BT, every_BT, every_BT.bool(), index))
    return found


def bare(model: PreTrainedModel, batches: list[Batch], device: torch.device) -> None:
    with torch.inference_mode():
        for batch in batches:
            model.base_model(
                input_ids=batch.input_ids_BT.to(device),
                attention_mask=batch.attention_mask_BT.to(device),
                use_cache=False,
            )


def in_groups(
    model: PreTrainedModel,
    targets: Mapping[str, Target],
    name: str,
    batches: Mapping[str, list[Batch]],
    size: Size,
    device: torch.device,
) -> int:
    """As `attach` with a memory_budget: each group's moments are reduced to bases and freed."""
    method = make_method(name, size.rank)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    widest = max(target.in_features for target in targets.values())
    beside = SOLVE_MATRICES * 8 * widest**2
    one = 4 * len(method.needs) * (widest**2 + widest)
    budget = max(BUDGET_GB * GB - held - beside, one) if device.type == "cuda" else 2 * one
    plan = plan_calibration(model, targets, copies=len(method.needs), budget=budget)
    for group in plan.groups:
        moments: Any = {
            role: collect_moments(model, group, batches[role], order=plan.order)
            for role in method.needs
        }
        solve_layers(model, method, group, moments, {}, seeds_of(targets, 0))
    return len(plan.groups)


def error_of_a_moment(
    model: PreTrainedModel, targets: Mapping[str, Target], size: Size
) -> dict[str, float]:
    """Of one batch at the first site, against the float64 sum of the same activations."""
    name, target = next(iter(targets.items()))
    seen: list[Tensor] = []
    hook = target.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    [batch] = random_batches(size, 2)[:1]
    found = collect_moments(model, {name: target}, [batch]).of(name).mean_DD().double()
    hook.remove()
    x_TD = seen[-1].reshape(-1, target.in_features).double()
    expected_DD = x_TD.T @ x_TD / len(x_TD)
    return {"error": float((found - expected_DD).norm() / expected_DD.norm())}


def corda(
    bench: Bench,
    model: PreTrainedModel,
    batches: list[Batch],
    size: Size,
    device: torch.device,
) -> None:
    """PEFT's preprocessing in its two steps, on the first layers and a part of the tokens."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import calib_cov_distribution, collect_eigens_for_layer

    names = "|".join(str(i) for i in range(size.corda_layers))
    config = LoraConfig(
        r=size.rank,
        init_lora_weights="corda",
        target_modules=rf".*\.layers\.({names})\..*_proj",
        corda_config=CordaConfig(corda_method="kpm"),
    )
    rows = batches[: max(size.corda_rows // size.batch_size, 1)]

    def run_model() -> None:
        for batch in rows:
            for ids_T in batch.input_ids_BT:  # as its documentation asks: one row at a time
                model(input_ids=ids_T[None].to(device), use_cache=False)

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".{i}." in name for i in names.split("|"))
    ]
    with torch.no_grad():
        with measured(device) as plain:
            run_model()
        with measured(device) as of:
            calib_cov_distribution(model, config, run_model, None, None)
        bench.add(
            f"PEFT's CorDA: covariances of {size.corda_layers} layers, {size.corda_rows} rows",
            ratio=of.seconds / plain.seconds,
            **of.figures(),
        )
        done = 0
        with measured(device) as of:
            begun = time.perf_counter()
            for name, module in layers:
                if time.perf_counter() - begun > size.corda_seconds:
                    break
                module.corda_method, module.rank = "kpm", size.rank
                collect_eigens_for_layer(module, config)
                synchronise(device)
                done += 1
                print(f"    {name}: {time.perf_counter() - begun:.1f} s", flush=True)
        bench.add(
            f"PEFT's CorDA: decompositions of {len(layers)} modules",
            modules=done,
            seconds_a_module=of.seconds / done,
            **of.figures(),
        )


class Floors:
    """Seconds that the arithmetic of a step takes."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Mapping[str, Target],
        size: Size,
        rates: Mapping[torch.dtype, float],
    ) -> None:
        self._tokens = size.rows * size.length
        self._rates = rates
        embedding = model.get_input_embeddings().weight.numel()
        self._parameters = sum(p.numel() for p in model.parameters()) - 2 * embedding
        sites = plan_calibration(model, targets, budget=10**15).order.site_of
        self._widths = [targets[site].in_features for site in sorted(set(sites.values()))]
        self._targets = targets

    def forward(self) -> float:
        return 2 * self._parameters * self._tokens / self._rates[torch.bfloat16]

    def moments(self) -> float:
        return sum(D**2 for D in self._widths) * self._tokens / self._rates[torch.bfloat16]

    def factors(self) -> float:
        return sum(D**3 / 3 for D in self._widths) / self._rates[torch.float32]

    def contrasts(self) -> float:
        """W S with S symmetric, and what it is multiplied with."""
        flops = 0
        for target in self._targets.values():
            D, K = target.in_features, min(target.in_features, target.out_features)
            flops += 2 * K * D * D + 2 * K * K * D
        return flops / self._rates[torch.float32]


def rate(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a product of random matrices."""
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    repetitions = 10
    with full_precision():
        for _ in range(3):
            left @ right
        synchronise(device)
        begun = time.perf_counter()
        for _ in range(repetitions):
            left @ right
        synchronise(device)
    return 2 * width**3 * repetitions / (time.perf_counter() - begun)


@dataclass
class Measured:
    seconds: float = 0.0
    peak: float = 0.0

    def figures(self, floor: float | None = None) -> dict[str, float]:
        found = {"seconds": self.seconds}
        if floor is not None:
            found |= {"floor_seconds": floor, "over_floor": self.seconds / floor}
        return found | ({"peak_gb": self.peak / GB} if self.peak else {})


@contextmanager
def measured(device: torch.device) -> Iterator[Measured]:
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = Measured()
    begun = time.perf_counter()
    yield found
    synchronise(device)
    found.seconds = time.perf_counter() - begun
    if device.type == "cuda":
        found.peak = torch.cuda.max_memory_allocated()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
