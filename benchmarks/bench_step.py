"""A training step of each form of adapter beside plain PEFT LoRA of the same rank.

    python benchmarks/bench_step.py

SmolLM2-135M in float32, every linear layer, rank 32, 8 rows of 128 tokens: forward, backward and
AdamW. The goals are 1.02 for `a` and `b`, which train one side, and 1.2 for `both`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timing import Bench, demo_batches, interleaved, loaded_demo, ratio
from torch import nn

from forgetless.adapters.forms import FORMS, adapted_layers
from forgetless.data.tokens import Batch
from forgetless.methods.base import AdapterInit, Trains

RANK = 32
GOALS: dict[Trains, float] = {"a": 1.02, "b": 1.02, "both": 1.2}
PEFT = "PEFT's LoRA"


def main() -> None:
    bench = Bench("step", "A training step over plain PEFT LoRA's, rank 32, 1,024 tokens")
    [batch] = demo_batches(loaded_demo("float32").tokenizer, rows=8, length=128, batch_size=8)
    ways: dict[str, Callable[[], object]] = {PEFT: step_of(adapted(None), batch)}
    ways |= {form: step_of(adapted(form), batch) for form in GOALS}
    seconds = interleaved(ways, repetitions=15)
    for form, goal in GOALS.items():
        bench.add(f"form {form}", **ratio(seconds, form, PEFT), goal=goal)
    bench.finish()


def adapted(form: Trains | None) -> PeftModel:
    """A model of its own; without a form the adapter is as PEFT makes it."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: PeftModel = get_peft_model(loaded_demo("float32").model, config)
    if form is not None:
        generator = torch.Generator().manual_seed(0)
        for layer in adapted_layers(model).values():
            a_RD = torch.randn(RANK, layer.in_features, generator=generator) / 100
            b_OR = torch.randn(layer.out_features, RANK, generator=generator) / 100
            FORMS[form].start(layer, "default", AdapterInit(a_RD, b_OR))
    return model.train()


def step_of(model: nn.Module, batch: Batch) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return partial(step, model, torch.optim.AdamW(trained, lr=1e-6), batch)


def step(model: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch) -> None:
    optimiser.zero_grad()
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    model(**inputs, labels=batch.input_ids_BT, use_cache=False).loss.backward()
    optimiser.step()


if __name__ == "__main__":
    main()
