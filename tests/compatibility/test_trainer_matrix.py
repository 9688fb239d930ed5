"""Trainers on a few unlike architectures: from a start to an export that PEFT alone reopens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import forgetless
from forgetless.adapters.forms import adapted_layers, factors
from tiny_bases import ENCODER_DECODERS, tiny_base
from trainer_setup import TRAINERS, seq2seq

BASES = ("llama", "qwen3", "gemma3", "gpt2", "qwen3_moe", "qwen2_moe", "t5", "bart")
MAKERS = {**TRAINERS, "seq2seq": seq2seq}
# TRL's trainers are for causal language models; an encoder-decoder takes Seq2SeqTrainer.
CASES = [
    (base, kind)
    for base in BASES
    for kind in MAKERS
    if (base in ENCODER_DECODERS) == (kind == "seq2seq")
]
IDS = torch.arange(5, 29).reshape(2, 12)
PRESERVE = [
    (f"The capital of country {i} is", f" city {i * 7 % 13}, and it rains.") for i in range(60)
]

pytestmark = pytest.mark.filterwarnings("ignore::forgetless.errors.ForgetlessWarning")


def preserve_data(base: str) -> Any:
    """Texts; for an encoder-decoder in two parts."""
    if base not in ENCODER_DECODERS:
        return [p + c for p, c in PRESERVE]
    rows = [{"prompt": p, "completion": c} for p, c in PRESERVE]
    return {"examples": rows, "prompt": "{prompt}", "completion": "{completion}"}


def logits(model: nn.Module, base: str) -> Tensor:
    model.eval()
    inputs = {"input_ids": IDS}
    if base in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = IDS.flip(1)
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.compatibility(base="{base}", trainer="{kind}", start="{start}", form="b")
@pytest.mark.parametrize("start", ["attach", "initialize"])
@pytest.mark.parametrize(("base", "kind"), CASES)
def test_a_trainer_trains_an_architecture_to_an_export(
    base: str, kind: str, start: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    untouched: Any = tiny_base(base)
    expected = logits(untouched, base)
    if kind == "dpo":  # without an adapter, its reference is loaded by name
        untouched.save_pretrained(tmp_path / "base")
        untouched.config._name_or_path = str(tmp_path / "base")

    def start_with(begin: Any, what: Any) -> PeftModel:
        method = {"name": "lora-null", "rank": 4}
        return begin(what, tiny_tokenizer, method=method, preserve_data=preserve_data(base))

    if start == "attach":
        model = start_with(forgetless.attach, untouched)
        trainer = MAKERS[kind](model, tiny_tokenizer, tmp_path, max_steps=2)
    else:
        trainer = MAKERS[kind](untouched, tiny_tokenizer, tmp_path, max_steps=2)
        model = start_with(forgetless.initialize, trainer)
    assert torch.equal(logits(model, base), expected), "does not start at the base"
    trainer.train()
    for name, layer in adapted_layers(model).items():
        a_RD, b_OR = factors(layer)
        assert (b_OR @ a_RD).any(), f"{name} has no update"
    forgetless.export(model, tmp_path / "exported")
    reopened = PeftModel.from_pretrained(tiny_base(base), str(tmp_path / "exported"))
    torch.testing.assert_close(logits(reopened, base), logits(model, base), rtol=1e-4, atol=1e-4)
