"""NLL, greedy match and KL against loops over single rows with full logits in float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from evaluation_setup import VOCABULARY, random_rows, with_lora
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from forgetless.data.tokens import TokenRow, make_batches
from forgetless.errors import AdapterError
from forgetless.evaluation import likelihood
from forgetless.evaluation.likelihood import compare_rows, kl_divergence, score_rows
from forgetless.evaluation.selection import chunk_size

TARGETS = ["q_proj", "v_proj", "down_proj"]


@torch.no_grad()
def naive_log_probabilities(model: torch.nn.Module, row: TokenRow) -> list[torch.Tensor]:
    """One vector of log probabilities for each scored token, from the logits of the row alone."""
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
    first = max(row.prompt_length, 1)
    return [
        logits[position - 1] - torch.logsumexp(logits[position - 1], 0)
        for position in range(first, len(row.input_ids))
    ]


def naive_nll(model: torch.nn.Module, row: TokenRow) -> float:
    first = max(row.prompt_length, 1)
    targets = row.input_ids[first:]
    return -sum(
        float(log[target])
        for log, target in zip(naive_log_probabilities(model, row), targets, strict=True)
    )


def naive_kl(base: list[torch.Tensor], tuned: list[torch.Tensor]) -> float:
    return sum(
        float(sum(math.exp(p) * (p - q) for p, q in zip(b.tolist(), t.tolist(), strict=True)))
        for b, t in zip(base, tuned, strict=True)
    )


def test_nll_equals_a_loop_over_single_rows(tiny_model, tiny_tokenizer):
    model = tiny_model.double()
    rows = random_rows()

    scores = score_rows(model, tiny_tokenizer, rows, batch_size=3)

    np.testing.assert_allclose(scores.nll_sum, [naive_nll(model, r) for r in rows], rtol=1e-12)
    expected = [len(r.input_ids) - max(r.prompt_length, 1) for r in rows]
    assert scores.num_tokens.tolist() == expected


def test_kl_equals_a_loop_over_single_rows(tiny_model, tiny_tokenizer):
    tuned = with_lora(tiny_model.double())
    rows = random_rows()

    base_scores, tuned_scores, kl = compare_rows(tuned, tiny_tokenizer, rows, batch_size=4)

    tuned_logs = [naive_log_probabilities(tuned, r) for r in rows]
    tuned_nll = [naive_nll(tuned, r) for r in rows]
    with tuned.disable_adapter():
        base_logs = [naive_log_probabilities(tuned, r) for r in rows]
        base_nll = [naive_nll(tuned, r) for r in rows]
    expected = [naive_kl(b, t) for b, t in zip(base_logs, tuned_logs, strict=True)]
    assert min(expected) > 0.01
    np.testing.assert_allclose(kl, expected, rtol=1e-10)
    np.testing.assert_allclose(base_scores.nll_sum, base_nll, rtol=1e-12)
    np.testing.assert_allclose(tuned_scores.nll_sum, tuned_nll, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_and_change_are_exactly_zero_for_an_untouched_adapter(tiny_model, tiny_tokenizer, dtype):
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    tuned = get_peft_model(tiny_model.to(dtype), config).eval()

    base_scores, tuned_scores, kl = compare_rows(tuned, tiny_tokenizer, random_rows(longest=120))

    assert (kl == 0).all()
    assert (base_scores.nll_sum == tuned_scores.nll_sum).all()
    assert (base_scores.nll_sum > 0).all()


def test_kl_ignores_a_constant_added_to_all_logits():
    base = torch.log_softmax(torch.tensor([[1.0, 2.0, 3.0]]), -1)
    shifted = torch.log_softmax(torch.tensor([[1.0, 2.0, 3.0]]) + 7, -1)
    assert float(likelihood.kl_divergence(base, shifted)) == pytest.approx(0, abs=1e-6)


def test_scores_do_not_depend_on_the_batch_size(tiny_model, tiny_tokenizer):
    tuned = with_lora(tiny_model)
    rows = random_rows(11)

    reference = compare_rows(tuned, tiny_tokenizer, rows, batch_size=1)
    for batch_size in (2, 5, 16):
        other = compare_rows(tuned, tiny_tokenizer, rows, batch_size=batch_size)
        for a, b in zip(reference[:2], other[:2], strict=True):
            np.testing.assert_allclose(a.nll_sum, b.nll_sum, rtol=1e-5)
            assert a.num_tokens.tolist() == b.num_tokens.tolist()
            assert a.greedy_match.tolist() == b.greedy_match.tolist()
        np.testing.assert_allclose(reference[2], other[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["tiny_model", "tiny_gpt2"])
def test_scores_do_not_depend_on_the_padding_side(which, request, tiny_tokenizer, monkeypatch):
    model = request.getfixturevalue(which)
    rows = random_rows()
    right = score_rows(model, tiny_tokenizer, rows, batch_size=4)
    monkeypatch.setattr(
        likelihood, "make_batches", functools.partial(make_batches, padding_side="left")
    )

    left = score_rows(model, tiny_tokenizer, rows, batch_size=4)

    np.testing.assert_allclose(left.nll_sum, right.nll_sum, rtol=1e-5)


def test_more_positions_than_one_chunk_give_the_same_sums(tiny_model, tiny_tokenizer):
    model = tiny_model.double()
    rows = [r for seed in range(5) for r in random_rows(8, seed=seed, longest=100)]
    assert sum(len(r.input_ids) for r in rows) > 2 * chunk_size(VOCABULARY)

    scores = score_rows(model, tiny_tokenizer, rows, batch_size=len(rows))

    np.testing.assert_allclose(scores.nll_sum, [naive_nll(model, r) for r in rows], rtol=1e-12)


def test_head_never_sees_more_than_a_chunk(tiny_model, tiny_tokenizer):
    seen = []
    head = tiny_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[:-1].numel()))
    rows = [TokenRow(tuple(range(4, 104)), 0)] * 16

    score_rows(tiny_model, tiny_tokenizer, rows, batch_size=16)
    handle.remove()

    assert max(seen) <= 512
    assert sum(seen) == 16 * 99


def test_logits_that_the_model_caps_after_the_head_are_capped_in_every_chunk(tiny_tokenizer):
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).double().eval()
    rows = [r for seed in range(3) for r in random_rows(5, seed=seed, longest=100)]
    assert sum(len(r.input_ids) for r in rows) > chunk_size(VOCABULARY)

    scores = score_rows(model, tiny_tokenizer, rows, batch_size=len(rows))

    # Gemma's norms compute in float32 whatever the weights; uncapped sums are off by a factor.
    np.testing.assert_allclose(scores.nll_sum, [naive_nll(model, r) for r in rows], rtol=1e-6)


def test_an_adapter_on_the_head_is_measured(make_tiny_model, tiny_tokenizer):
    model = make_tiny_model(tie_word_embeddings=False).double()
    config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config).eval()
    with torch.no_grad():
        tuned.get_base_model().lm_head.lora_B["default"].weight.normal_(
            generator=torch.Generator().manual_seed(0)
        )
    rows = [r for seed in range(3) for r in random_rows(5, seed=seed, longest=100)]
    assert sum(len(r.input_ids) for r in rows) > chunk_size(VOCABULARY)

    _, tuned_scores, kl = compare_rows(tuned, tiny_tokenizer, rows, batch_size=len(rows))

    expected = [naive_nll(tuned, r) for r in rows]
    np.testing.assert_allclose(tuned_scores.nll_sum, expected, rtol=1e-10)
    assert (kl > 0.01).all()


def test_greedy_match_agrees_with_real_greedy_generation(tiny_model, tiny_tokenizer):
    rows, expected = [], []
    for index, row in enumerate(random_rows(10)):
        prompt = list(row.input_ids)
        with torch.no_grad():
            made = tiny_model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
            )[0].tolist()
        if index % 3 == 0:  # wrong in one place only
            made[len(prompt) + index % 5] = 4 + (made[len(prompt) + index % 5] + 1) % 300
        rows.append(TokenRow(tuple(made), len(prompt)))
        expected.append(index % 3 != 0)

    scores = score_rows(tiny_model, tiny_tokenizer, rows, batch_size=4)

    assert scores.greedy_match.tolist() == expected


def test_rows_without_a_scored_token_count_nothing_and_never_match(tiny_model, tiny_tokenizer):
    rows = [TokenRow((5, 6, 7), 3), TokenRow((5,), 0), TokenRow((5, 6, 7), 1)]

    scores = score_rows(tiny_model, tiny_tokenizer, rows)

    assert scores.num_tokens.tolist() == [0, 0, 2]
    assert scores.nll_sum[:2].tolist() == [0, 0]
    assert not scores.greedy_match[:2].any()


def test_adapter_of_another_dtype_than_the_base_is_measured(tiny_model, tiny_tokenizer):
    tuned = with_lora(tiny_model.bfloat16())
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()

    base, scores, kl = compare_rows(tuned, tiny_tokenizer, random_rows())

    assert np.isfinite(scores.nll_sum).all()
    assert (kl > 0).all()
    assert (base.nll_sum != scores.nll_sum).any()


def test_autocast_left_behind_by_a_trainer_does_not_reach_the_figures(tiny_model, tiny_tokenizer):
    tuned = with_lora(tiny_model)
    rows = random_rows()
    reference = score_rows(tuned, tiny_tokenizer, rows)
    tuned.forward = torch.autocast("cpu", torch.bfloat16)(tuned.forward)

    scores = score_rows(tuned, tiny_tokenizer, rows)

    assert scores.nll_sum.tolist() == reference.nll_sum.tolist()


def test_a_model_without_a_head_is_refused_by_name(tiny_model, tiny_tokenizer):
    with pytest.raises(AdapterError, match="AutoModelForCausalLM"):
        score_rows(tiny_model.model, tiny_tokenizer, random_rows())


def test_progress_counts_every_row(tiny_model, tiny_tokenizer):
    seen = []
    score_rows(tiny_model, tiny_tokenizer, random_rows(7), batch_size=3, progress=seen.append)
    assert seen == [3, 3, 1]


def test_tokens_that_the_base_rules_out_add_nothing_to_kl():
    ruled_out = torch.log_softmax(torch.tensor([[0.0, 1.0, -math.inf]]), -1)
    other = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0]]), -1)

    assert kl_divergence(ruled_out, ruled_out).tolist() == [0.0]
    # Of the other the two have 1 / (1 + e²/(1+e)) between them, in the same proportion.
    left = math.log(1 + math.exp(2) / (1 + math.e))
    assert kl_divergence(ruled_out, other).item() == pytest.approx(left, rel=1e-6)
    # What the base can say and the tuned model cannot is infinitely far.
    assert kl_divergence(other, ruled_out).tolist() == [math.inf]
