"""Greedy generation in batches, plain whatever the model's own generation config says."""

# Shape letters in this file: B = rows of a batch, T = prompt positions, G = generated positions.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from forgetless.data.tokens import pad_token_id
from forgetless.models.placement import input_device
from forgetless.models.targets import base_of


@dataclass(frozen=True)
class Generated:
    """What a model generated for each prompt, in the order of the prompts.

    Attributes:
        texts: The text, without special tokens.
        hit_limit: Whether it ran into `max_new_tokens` without an end token.
    """

    texts: list[str]
    hit_limit: list[bool]


@torch.no_grad()
def generate_greedy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Generated:
    """Continue each prompt with the most likely tokens, up to an end-of-text token.

    Prompts of like length go together, padded on the left. The tokenizer is never changed, and the
    model's `generation_config` is the same object afterwards.

    Args:
        model: A causal language model or a PeftModel, in eval mode.
        tokenizer: Decodes, and names the padding and end-of-text tokens.
        prompts: Token ids of each prompt, at least one token each.
        max_new_tokens: Limit on what is generated.
        batch_size: Prompts a forward pass.
        progress: Called with the number of prompts of each finished batch.

    Returns:
        The generated texts, and which of them were cut off by the limit.
    """
    causal = base_of(model)
    eos_ids = end_token_ids(causal, tokenizer)
    pad_id, device = pad_token_id(tokenizer), input_device(causal)
    texts, hit_limit = [""] * len(prompts), [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        ids_BT, mask_BT = _pad_left([prompts[i] for i in index], pad_id)
        with _decoding_greedily(causal, eos_ids, pad_id, max_new_tokens) as config:
            output_BT = causal.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=config,
            )
        output_BG = output_BT[:, ids_BT.shape[1] :]
        for i, new_ids in zip(index, output_BG.tolist(), strict=True):
            kept = _until_end(new_ids, eos_ids)
            texts[i] = tokenizer.decode(kept, skip_special_tokens=True)
            hit_limit[i] = len(kept) == max_new_tokens
        if progress is not None:
            progress(len(index))
    return Generated(texts, hit_limit)


@contextmanager
def _decoding_greedily(
    model: PreTrainedModel, eos_ids: Sequence[int], pad_id: int, max_new_tokens: int
) -> Iterator[GenerationConfig]:
    """While open, the model's generation config is plain greedy decoding and nothing else.

    `generate` fills whatever a config given to it leaves open from the model's own: sampling,
    penalties, beams, forbidden words. They must not act, and their mix with greedy decoding warns.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
    )
    try:
        yield model.generation_config
    finally:
        model.generation_config = before


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the tokenizer's and those of the model's generation config.

    Chat models often have several (end of turn, end of text).
    """
    configured = model.generation_config.eos_token_id
    if configured is None:
        configured = []
    ids = set(configured if isinstance(configured, list) else [configured])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(int(i) for i in ids)


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask_BT[row, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _until_end(ids: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """Ids before the first end token; what follows is padding."""
    end = next((k for k, token in enumerate(ids) if token in eos_ids), len(ids))
    return list(ids[:end])
