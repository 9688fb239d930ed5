"""Greedy generation in batches equals token-by-token argmax of single prompts."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from forgetless.evaluation.generation import end_token_ids, generate_greedy


def random_prompts(count: int = 4, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [tuple(torch.randint(4, 384, (n,), generator=generator).tolist()) for n in lengths]


@torch.no_grad()
def naive_greedy(model, tokenizer, prompt, max_new_tokens: int, eos: set[int]) -> str:
    ids = list(prompt)
    for _ in range(max_new_tokens):
        best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in eos:
            break
        ids.append(best)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("which", ["tiny_model", "tiny_gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_equals_argmax_of_single_prompts(which, batch_size, request, tiny_tokenizer):
    model = request.getfixturevalue(which)
    prompts = random_prompts()
    eos = {tiny_tokenizer.eos_token_id}
    expected = [naive_greedy(model, tiny_tokenizer, p, 6, eos) for p in prompts]

    generated = generate_greedy(
        model, tiny_tokenizer, prompts, max_new_tokens=6, batch_size=batch_size
    )

    texts = generated.texts
    assert texts == expected
    assert len(set(texts)) > 1


def test_generation_stops_at_every_end_token_of_the_model(tiny_model, tiny_tokenizer):
    prompt = random_prompts(1)[0]
    whole = tiny_model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    stop = whole[3]
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, stop]

    generated = generate_greedy(tiny_model, tiny_tokenizer, [prompt], max_new_tokens=8)
    short = generate_greedy(tiny_model, tiny_tokenizer, [prompt], max_new_tokens=whole.index(stop))

    assert generated.hit_limit == [False]
    assert short.hit_limit == [True]  # the end token would have been the next one
    assert short.texts == generated.texts
    (text,) = generated.texts
    assert text == tiny_tokenizer.decode(whole[: whole.index(stop)], skip_special_tokens=True)
    assert end_token_ids(tiny_model, tiny_tokenizer) == sorted({tiny_tokenizer.eos_token_id, stop})


def test_sampling_defaults_of_the_model_neither_act_nor_warn_nor_change(
    tiny_model, tiny_tokenizer, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    logging.getLogger("transformers").manager._clear_cache()
    prompts = random_prompts()
    expected = generate_greedy(tiny_model, tiny_tokenizer, prompts, max_new_tokens=6)
    tiny_model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_p=0.3,
        top_k=3,
        min_p=0.2,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        max_length=5,
        num_beams=3,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    caplog.clear()
    config = tiny_model.generation_config
    before = copy.deepcopy(config.to_dict())
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        texts = generate_greedy(tiny_model, tiny_tokenizer, prompts, max_new_tokens=6)

    assert texts == expected
    assert not caplog.records
    assert tiny_model.generation_config is config
    assert config.to_dict() == before


def test_tokenizer_without_a_padding_token_stays_without_one(tiny_model, tiny_tokenizer):
    prompts = random_prompts()
    expected = generate_greedy(tiny_model, tiny_tokenizer, prompts, max_new_tokens=6)
    tiny_tokenizer.pad_token = None
    side = tiny_tokenizer.padding_side

    texts = generate_greedy(tiny_model, tiny_tokenizer, prompts, max_new_tokens=6)

    assert texts == expected
    assert tiny_tokenizer.pad_token is None
    assert tiny_tokenizer.padding_side == side


def test_base_generates_inside_disable_adapter(tiny_model, tiny_tokenizer):
    prompts = random_prompts()
    expected = generate_greedy(tiny_model, tiny_tokenizer, prompts, max_new_tokens=6)
    tuned = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    tuned.eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))

    with tuned.disable_adapter():
        base = generate_greedy(tuned, tiny_tokenizer, prompts, max_new_tokens=6)

    assert base == expected
    assert generate_greedy(tuned, tiny_tokenizer, prompts, max_new_tokens=6) != expected


def test_progress_counts_every_prompt(tiny_model, tiny_tokenizer):
    seen = []
    generate_greedy(
        tiny_model, tiny_tokenizer, random_prompts(5), batch_size=2, max_new_tokens=2,
        progress=seen.append,
    )  # fmt: skip
    assert seen == [2, 2, 1]
