"""The base's hidden states on disk: KL from them is bit for bit that of two forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_setup import random_rows, with_lora
from transformers import Gemma2Config, Gemma2ForCausalLM

from forgetless.errors import ForgetlessWarning
from forgetless.evaluation import base_states
from forgetless.evaluation.base_cache import BaseCache
from forgetless.evaluation.likelihood import compare_rows
from forgetless.models.targets import base_of


def compared(model, tokenizer, rows, cache):
    """Scores and KL with the cache, and how many forward passes the decoder made."""
    passes = []
    decoder = base_of(model).get_decoder()
    handle = decoder.register_forward_hook(lambda *_: passes.append(1))
    with cache.states(rows, 4) as states:
        base, tuned, kl = compare_rows(model, tokenizer, rows, batch_size=4, states=states)
    handle.remove()
    return (base.nll_sum, base.greedy_match, tuned.nll_sum, kl), len(passes)


@pytest.mark.parametrize("longest", [20, 200])  # one chunk of positions a batch, and several
def test_kl_from_kept_states_is_bit_for_bit_that_of_two_passes(
    make_tiny_model, tiny_tokenizer, tmp_path, longest
):
    rows = random_rows(11, longest=longest)
    model = with_lora(make_tiny_model())
    plain, both = compared(model, tiny_tokenizer, rows, BaseCache(None, []))
    first, again = compared(model, tiny_tokenizer, rows, BaseCache(tmp_path, ["model"]))
    kept, tuned_only = compared(model, tiny_tokenizer, rows, BaseCache(tmp_path, ["model"]))
    for found in (first, kept):
        for ours, wanted in zip(found, plain, strict=True):
            np.testing.assert_array_equal(ours, wanted)
    assert plain[3].min() > 0
    assert both == again == 2 * tuned_only


def test_states_of_other_rows_batches_or_models_are_not_taken(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    rows = random_rows(11)
    model = with_lora(make_tiny_model())
    compared(model, tiny_tokenizer, rows, BaseCache(tmp_path, ["model"]))
    assert compared(model, tiny_tokenizer, rows[1:], BaseCache(tmp_path, ["model"]))[1] == 6
    assert compared(model, tiny_tokenizer, rows, BaseCache(tmp_path, ["other"]))[1] == 6
    with BaseCache(tmp_path, ["model"]).states(rows, 5) as states:
        assert states.of(0, 1) is None


def test_a_damaged_file_is_computed_again_with_a_warning(make_tiny_model, tiny_tokenizer, tmp_path):
    rows = random_rows(11)
    model = with_lora(make_tiny_model())
    cache = BaseCache(tmp_path, ["model"])
    wanted, _ = compared(model, tiny_tokenizer, rows, cache)
    (path,) = tmp_path.glob("base-states-*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(ForgetlessWarning, match=f"{path.name} cannot be used"):
        found, passes = compared(model, tiny_tokenizer, rows, cache)
    assert passes == 6
    np.testing.assert_array_equal(found[3], wanted[3])
    assert compared(model, tiny_tokenizer, rows, cache)[1] == 3


def test_a_set_too_large_to_keep_and_a_pass_that_fails_leave_no_file(
    make_tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    rows = random_rows(11)
    model = with_lora(make_tiny_model())
    states = BaseCache(tmp_path, ["model"]).states(rows, 4)
    states.keep(0, torch.zeros(3, 2))
    states.__exit__(RuntimeError, RuntimeError("stopped"), None)
    monkeypatch.setattr(base_states, "LARGEST", 1000)
    compared(model, tiny_tokenizer, rows, BaseCache(tmp_path, ["model"]))
    assert [p for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_where_the_model_caps_what_the_head_gives_nothing_is_kept(tiny_tokenizer, tmp_path):
    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_lora(Gemma2ForCausalLM(config).eval())
    rows = random_rows(11)
    cache = BaseCache(tmp_path, ["model"])
    first, _ = compared(model, tiny_tokenizer, rows, cache)
    second, passes = compared(model, tiny_tokenizer, rows, cache)
    assert passes == 6
    assert [p for p in tmp_path.iterdir() if p.suffix != ".lock"] == []
    np.testing.assert_array_equal(first[3], second[3])
