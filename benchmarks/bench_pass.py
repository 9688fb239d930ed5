"""Calibration beside a bare forward pass without the head: same model object, kernels and batches.

    python benchmarks/bench_pass.py

16,384 tokens. The goals are 1.25 in float32 and 1.35 in bfloat16.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import Bench, demo_batches, interleaved, loaded_demo, ratio
from torch import nn

from forgetless.calibration.engine import collect_moments
from forgetless.calibration.memory import plan_calibration
from forgetless.data.tokens import Batch
from forgetless.models.targets import Target, find_targets

GOALS = {"float32": 1.25, "bfloat16": 1.35}
QUARTER_GOAL = 2.5


def main() -> None:
    bench = Bench("pass", "Calibration over a bare forward pass, 16,384 tokens")
    for dtype, goal in GOALS.items():
        loaded = loaded_demo(dtype)
        model, targets = loaded.model, find_targets(loaded.model).targets
        batches = demo_batches(loaded.tokenizer, rows=8, length=2048, batch_size=2)
        whole = plan_calibration(model, targets).moment_bytes
        quarter = plan_calibration(model, targets, budget=whole // 4)
        seconds = interleaved(
            {
                "bare": partial(bare, model, batches),
                "calibration": partial(collect_moments, model, targets, batches),
                "quarter": partial(in_groups, model, quarter.groups, quarter.order, batches),
            }
        )
        bench.add(f"{dtype}: calibration", **ratio(seconds, "calibration", "bare"), goal=goal)
        passes = len(quarter.groups)
        bench.add(
            f"{dtype}: in {passes} passes, a quarter of the memory, over one pass",
            **ratio(seconds, "quarter", "calibration"),
            goal=QUARTER_GOAL,
        )
    bench.finish()


def bare(model: nn.Module, batches: list[Batch]) -> None:
    with torch.inference_mode():
        for batch in batches:
            model.base_model(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                use_cache=False,
            )


def in_groups(
    model: nn.Module, groups: tuple[dict[str, Target], ...], order: object, batches: list[Batch]
) -> None:
    for group in groups:
        collect_moments(model, group, batches, order=order)


if __name__ == "__main__":
    main()
