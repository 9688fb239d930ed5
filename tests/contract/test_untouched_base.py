"""What an adapter has changed is never calibrated on, loaded onto or fingerprinted as the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

import forgetless
from forgetless.adapters.load import load_adapter
from forgetless.calibration.hooks import base_forward
from forgetless.errors import AdapterError

TEXTS = [f"The capital of country {i} is city {i * 7 % 13}, and it rains there." for i in range(40)]


def lora(model: nn.Module) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def attach(model: nn.Module, tokenizer: PreTrainedTokenizerBase, **options: object) -> PeftModel:
    return forgetless.attach(model, tokenizer, rank=4, preserve_data=TEXTS, **options)


def test_attaching_twice_to_the_bare_model_is_refused_and_caches_nothing(
    tiny_model: nn.Module, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    attach(tiny_model, tiny_tokenizer)
    with pytest.raises(AdapterError, match=r"without adapters, got one at layer .*unload\(\)"):
        attach(tiny_model, tiny_tokenizer, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_attaching_again_after_unload_starts_as_the_first_time(
    tiny_model: nn.Module, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    first = attach(tiny_model, tiny_tokenizer)
    before = {n: p.clone() for n, p in first.named_parameters() if "lora_A" in n}
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    second = attach(first.unload(), tiny_tokenizer)
    for name, tensor in before.items():
        assert torch.equal(second.get_parameter(name), tensor)


def test_attaching_beside_a_merged_adapter_is_refused_and_it_stays_merged(
    tiny_model: nn.Module, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = lora(tiny_model)
    model.merge_adapter()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterError, match="'default' merged into layer"):
        attach(model, tiny_tokenizer, adapter="second", cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_loading_twice_onto_the_bare_model_is_refused(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    lora(tiny_model).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="without adapters"):
        load_adapter(tiny_model, tmp_path)


def test_a_calibration_pass_sees_the_dtype_of_the_weights_under_autocast(
    tiny_model: nn.Module,
) -> None:
    ids = torch.arange(5, 29).reshape(2, 12)
    with base_forward(tiny_model) as decoder:
        expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16), base_forward(tiny_model) as decoder:
        found = decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(found, expected)
