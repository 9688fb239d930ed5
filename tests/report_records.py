"""Records for the report's tests: built by hand, with figures of the size that real runs give."""

from __future__ import annotations

import math
import random
from typing import Any

from forgetless.evaluation.results import (
    Estimate,
    EvaluationReport,
    ItemResult,
    LayerMovement,
    MetricResult,
    Movement,
    Sample,
)
from forgetless.experiments.record import (
    DataFacts,
    LayerStart,
    LogPoint,
    ModelFacts,
    Record,
    TrainingFacts,
)

PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def around(mean: float, half: float, n: int = 200) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=n)


def metric(
    name: str,
    base: float | None,
    tuned: float,
    half: float = 0.01,
    *,
    n: int = 200,
    higher: bool = True,
) -> MetricResult:
    """A metric whose intervals all have the half width `half`; `kl` has neither base nor change."""
    if base is None:
        return MetricResult(
            metric=name,
            base=None,
            tuned=around(tuned, half, n),
            change=None,
            higher_is_better=False,
        )
    return MetricResult(
        metric=name,
        base=around(base, half, n),
        tuned=around(tuned, half, n),
        change=around(tuned - base, half, n),
        higher_is_better=higher,
    )


def kl(value: float) -> MetricResult:
    return metric("kl", None, value, value * 0.11)


def nll(base: float, tuned: float, half: float = 0.02) -> MetricResult:
    return metric("nll", base, tuned, half, higher=False)


def item(
    name: str, side: str, *metrics: MetricResult, samples: tuple[Sample, ...] = ()
) -> ItemResult:
    return ItemResult.model_validate(
        {
            "name": name,
            "side": side,
            "rows": 200,
            "truncated_rows": 3,
            "metrics": {m.metric: m for m in metrics},
            "samples": samples,
        }
    )


def movement(update_size: float, leakage: float, seed: int = 0, blocks: int = 30) -> Movement:
    draw = random.Random(seed)
    layers = {}
    for block in range(blocks):
        for part in PARTS:
            leak = leakage * math.exp(draw.gauss(0, 0.5) - 0.03 * block)
            size = update_size * math.exp(draw.gauss(0, 0.3) + 0.02 * block)
            layers[f"model.layers.{block}.{part}"] = LayerMovement(
                update_size=size,
                drift=size**2 * leak,
                drift_calibration=size**2 * leak / 3,
                leakage=leak,
                relative_norm=size / 2,
            )
    return Movement(
        update_size=update_size,
        drift=update_size**2 * leakage,
        drift_calibration=update_size**2 * leakage / 3,
        leakage=leakage,
        relative_norm=update_size / 2,
        layers=layers,
    )


def record(
    label: str,
    method: str,
    items: tuple[ItemResult, ...],
    *,
    moved: Movement | None = None,
    scaled: tuple[EvaluationReport, ...] = (),
    seed: int = 0,
    **changes: Any,
) -> Record:
    draw = random.Random(label)
    curve = [
        LogPoint(
            step=s,
            loss=1.4 * math.exp(-s / 60) + 0.35 + draw.gauss(0, 0.03),
            learning_rate=1e-3,
            grad_norm=1.0,
        )
        for s in range(5, 205, 5)
    ]
    values: dict[str, Any] = {
        "label": label,
        "created": "2026-11-22T08:30:00Z",
        "seed": seed,
        "method": {"name": method, "rank": 32, "alpha": 32},
        "recipe": {
            "model": "demo",
            "method": {"name": method, "rank": 32},
            "train_data": [
                {"path": "chain_sum.jsonl", "prompt": "{question}", "completion": " {answer}"}
            ],
            "preserve_data": [
                {"path": "facts.jsonl", "rows": [0, 1800]},
                {"self": True, "limit": 64},
            ],
            "training": {"learning_rate": 1e-3, "epochs": 1.0, "batch_size": 8},
            "seed": seed,
            "output": f"runs/{method}",
        },
        "versions": {
            "forgetless": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
        },
        "git_commit": "4f1c2ab9d0",
        "hardware": {"cpu": "Xeon, 2 cores, AMX", "memory": "8 GB"},
        "model": ModelFacts(
            name="HuggingFaceTB/SmolLM2-135M-Instruct",
            revision=None,
            fingerprint="a3f09c1b77de4410",
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
            dtype="bfloat16",
            device="cpu",
        ),
        "data": [
            DataFacts(
                role=role,
                source=f"{role}.jsonl",
                fingerprint=f"{abs(hash(role)):016x}"[:16],
                rows=1800,
                tokens=73_412,
                truncated_rows=3,
            )
            for role in ("train", "preserve", *(i.name for i in items))
        ],
        "phases": {"load": 2.1, "calibrate": 41.3, "solve": 12.2, "train": 181.0, "evaluate": 74.9},
        "layers": {"model.layers.0.mlp.up_proj": LayerStart(site="s", rank=32, diagnostics={})},
        "skipped_layers": {"lm_head": "the head is tied to the embeddings"},
        "warnings": [
            "model.layers.3.mlp.down_proj: 4100 tokens, under four times the width of 1536"
        ],
        "training": TrainingFacts(
            learning_rate=1e-3,
            learning_rate_source="best validation gain of 2e-4, 5e-4, 1e-3",
            steps=200,
            epochs=1.0,
            tokens=210_000,
            trainable_parameters=9_768_960,
            resumed_from=[],
            curve=curve,
            validation_nll=0.41,
        ),
        "evaluation": EvaluationReport(items=items, movement=moved, seconds=74.9),
        "scaled": list(scaled),
    }
    return Record.model_validate(values | changes)


SAMPLES = (
    Sample(
        prompt="State the final answer to the following arithmetic problem: 427 + 86 - 19 =",
        reference="494",
        base="The final answer is 427 + 86 - 19 = 452.",
        tuned="494",
    ),
)
FACT_SAMPLES = (
    Sample(
        prompt="What is the capital of Burkina Faso?",
        reference="Ouagadougou",
        base="The capital of Burkina Faso is Ouagadougou.",
        tuned="Ouagadougou.",
    ),
    Sample(
        prompt="What is the capital of Australia?",
        reference="Canberra",
        base="The capital of Australia is Canberra.",
        tuned="7",
    ),
)


def trade_off(
    kls: tuple[float, float, float],
    gain: float,
    answers: float,
    factor: float = 1.0,
    generated: bool = True,
) -> tuple[ItemResult, ...]:
    """Items of an adapter whose ΔW is scaled by `factor`: KL goes with its square."""
    k = factor**2
    learnt = (nll(1.55, 1.55 - gain * (1 - (1 - factor) ** 2)),)
    if generated:
        learnt += (metric("last_number", 0.12, 0.12 + 0.75 * gain, 0.06),)
    facts = (kl(kls[0] * k), nll(2.31, 2.31 + kls[0] * k * 0.8))
    if generated:
        facts += (metric("exact_match", 0.567, 0.567 + answers, 0.03),)
    return (
        item("chain_sum", "gain", *learnt, samples=SAMPLES),
        item("capitals", "retention", *facts, samples=FACT_SAMPLES),
        item(
            "elements",
            "retention",
            kl(kls[1] * k),
            nll(3.05, 3.05 + kls[1] * k * 0.4),
            *((metric("exact_match", 0.31, 0.31 + answers / 3, 0.03),) if generated else ()),
        ),
        item("self", "retention", kl(kls[2] * k), nll(1.82, 1.82 + kls[2] * k * 0.9)),
    )


def realistic_records() -> list[Record]:
    """Four methods on one demo: LoRA-Null forgets least, SC-LoRA gains most."""
    rows: tuple[tuple[str, str, tuple[float, float, float], float, float, float, float], ...] = (
        ("LoRA", "lora", (0.630, 0.956, 0.110), 0.676, -0.082, 0.31, 0.9),
        ("LoRA-Null v2", "lora-null", (0.0046, 0.129, 0.0205), 0.673, -0.004, 0.42, 0.004),
        ("SC-LoRA β 0.8", "sc-lora", (0.121, 0.430, 0.071), 0.714, -0.02, 0.37, 0.31),
        ("LoRA-Null v1", "lora-null", (0.019, 0.17, 0.033), 0.668, 0.006, 0.4, 0.05),
    )
    records = []
    for label, method, kls, gain, answers, size, leak in rows:
        scaled = tuple(
            EvaluationReport(items=trade_off(kls, gain, answers, f, generated=False), scale=f)
            for f in (0.1, 0.3, 0.5, 0.7, 0.9)
        )
        records.append(
            record(
                label,
                method,
                trade_off(kls, gain, answers),
                moved=movement(size, leak, seed=len(records)),
                scaled=scaled,
            )
        )
    return records
