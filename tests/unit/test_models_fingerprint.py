"""The fingerprint sees what a configuration changes, and nothing that training does to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.load import load_model


def with_lora(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize(
    "other",
    [{"rms_norm_eps": 1e-3}, {"rope_theta": 500.0}, {"attn_implementation": "eager"}],
    ids=lambda options: next(iter(options)),
)
def test_fingerprint_tells_configurations_with_equal_weights_apart(
    make_tiny_model: Callable[..., PreTrainedModel], other: dict[str, object]
) -> None:
    model, changed = make_tiny_model(), make_tiny_model(**other)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters(), strict=True)
    )
    assert model_fingerprint(changed) != model_fingerprint(model)
    assert model_fingerprint(with_lora(changed)) != model_fingerprint(with_lora(model))


def test_fingerprint_follows_a_change_of_attention(tiny_model: PreTrainedModel) -> None:
    before = model_fingerprint(tiny_model)
    tiny_model.set_attn_implementation("eager")
    assert model_fingerprint(tiny_model) != before


def test_fingerprint_is_the_same_inside_and_after_training(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """TRL and transformers change token ids, the cache switch and more in the configuration."""
    before = model_fingerprint(tiny_model)
    tiny_model.config.pad_token_id = None
    tiny_model.config.eos_token_id = 5
    model = with_lora(tiny_model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": ["one apple", "two apples"] * 4}),
        processing_class=tiny_tokenizer,
    )
    trainer.train()
    assert tiny_model.config.eos_token_id != 5
    assert model_fingerprint(model) == before
    assert model_fingerprint(model.unload()) == before


def test_fingerprint_does_not_depend_on_where_a_model_lies(
    make_tiny_model: Callable[..., PreTrainedModel], save_model: Callable[..., Path]
) -> None:
    found = set()
    for name in ("one", "two"):
        folder = save_model(make_tiny_model(), name)
        found.add(model_fingerprint(load_model(str(folder), dtype="float32", device="cpu").model))
    assert len(found) == 1


@pytest.mark.parametrize("row", [0, 1, 17, 383])
def test_fingerprint_sees_one_edited_row_of_an_embedding(
    tiny_model: PreTrainedModel, row: int
) -> None:
    before = model_fingerprint(tiny_model)
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[row, 3] += 1e-3
    assert model_fingerprint(tiny_model) != before
