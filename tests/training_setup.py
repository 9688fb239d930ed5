"""Tiny models with an adapter in each form, and token rows, for the tests of training."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from forgetless.adapters.forms import FORMS, adapted_layers
from forgetless.data.tokens import TokenRow
from forgetless.methods.base import AdapterInit, Trains
from forgetless.training.options import TrainingOptions

ALL_FORMS: tuple[Trains, ...] = ("plain", "a", "b", "both")


def adapted(
    model: PreTrainedModel,
    form: Trains = "plain",
    *,
    rank: int = 4,
    seed: int = 0,
    alpha: float | None = None,
    **lora: object,
) -> PeftModel:
    """`model` with an adapter of the given form on every linear layer, random A0 and B0."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear",
        **{"task_type": "CAUSAL_LM", **lora},  # type: ignore[arg-type]
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(peft_model).values():
        a_RD = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
        b_OR = torch.randn(layer.out_features, rank, generator=generator) / rank**0.5
        FORMS[form].start(layer, "default", AdapterInit(a_RD, b_OR))
    return peft_model


def token_rows(
    count: int, *, seed: int = 0, vocabulary: int = 300, longest: int = 14
) -> list[TokenRow]:
    """Rows of unlike lengths: prompts of 0 to 5 tokens, completions of 2 and more."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for _ in range(count):
        prompt, length = draw(0, 6), draw(8, longest)
        ids = torch.randint(4, vocabulary, (length,), generator=generator)
        rows.append(TokenRow(tuple(ids.tolist()), prompt))
    return rows


def options(**changes: object) -> TrainingOptions:
    """Short training, float32, a rate at which weights move."""
    values: dict[str, object] = {
        "learning_rate": 5e-3,
        "batch_size": 4,
        "save_steps": 1000,
        "logging_steps": 1,
        "bf16": False,
    }
    return TrainingOptions(**{**values, **changes})


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of every adapter tensor, trainable or frozen."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
