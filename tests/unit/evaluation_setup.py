"""Data and adapters that the tests of evaluation share."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from forgetless.data.tokens import TokenRow

QUESTIONS = [
    {"question": f"How many apples are there in row {i}?", "answer": f" there are {i} apples"}
    for i in range(6)
]
GAIN = {
    "name": "apples",
    "examples": QUESTIONS,
    "prompt": "Question: {question}\nAnswer:",
    "completion": "{answer}",
    "metrics": ["nll", "greedy_match", "last_number"],
    "max_new_tokens": 4,
    "batch_size": 4,
}
VOCABULARY = 384  # of the tiny models
TEXTS = ["The capital of France is Paris.", "Iron is an element.", "The dog sleeps on and on."]


def with_lora(model: torch.nn.Module) -> PeftModel:
    """The same adapter each time, clearly away from the base, with dropout that training shows."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.5,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(noise.to(parameter.dtype))
    return tuned.eval()


def random_rows(count: int = 7, *, seed: int = 0, longest: int = 40) -> list[TokenRow]:
    """Rows of very different length, every second one with a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(2, longest, (), generator=generator))
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length, (), generator=generator)) if index % 2 else 0
        rows.append(TokenRow(tuple(ids), prompt))
    return rows
