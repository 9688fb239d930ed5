"""Architectures whose LoRA llama.cpp can be given: names, and the order of rows, in GGUF files.

llama.cpp's converter keeps most weights as they are. Of Llama and Mistral it reorders the rows of
queries and keys, of GPT-NeoX those of the fused projection; an update has to follow its weight. An
architecture stands here only where the engine itself was seen to compute the same with the adapter
as transformers does (tests/integration/test_llama_cpp.py).
"""

# Shape letters in this file: O = layer output width, R = rank.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from forgetless.errors import AdapterError

NAME = "llama.cpp"
# Head counts of a layer from a configuration; each head owns O / heads consecutive rows.
Heads = Callable[[PreTrainedConfig], int]


@dataclass(frozen=True, slots=True)
class RowOrder:
    """A reordering of a weight's rows, and its inverse by another formula.

    Attributes:
        heads: How many heads share the rows.
        to_gguf: B (O, R) and heads → B as llama.cpp orders it.
        from_gguf: The same backwards; never defined through `to_gguf`, which it checks.
    """

    heads: Heads
    to_gguf: Callable[[Tensor, int], Tensor]
    from_gguf: Callable[[Tensor, int], Tensor]


def _pairs_together(b_OR: Tensor, heads: int) -> Tensor:
    """Transformers rotates row i with row i + half of a head, llama.cpp row 2 i with 2 i + 1."""
    return b_OR.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _halves_apart(b_OR: Tensor, heads: int) -> Tensor:
    width = b_OR.shape[0] // heads
    rows = torch.arange(b_OR.shape[0], device=b_OR.device)
    head, half, i = rows // width, rows % width // (width // 2), rows % (width // 2)
    return b_OR[head * width + 2 * i + half]


def _queries_first(b_OR: Tensor, heads: int) -> Tensor:
    """GPT-NeoX holds q, k, v head by head, llama.cpp all queries, then all keys, then values."""
    return b_OR.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _head_by_head(b_OR: Tensor, heads: int) -> Tensor:
    width = b_OR.shape[0] // (3 * heads)
    rows = torch.arange(b_OR.shape[0], device=b_OR.device)
    head, part, i = rows // (3 * width), rows // width % 3, rows % width
    return b_OR[part * heads * width + head * width + i]


def _query_heads(config: PreTrainedConfig) -> int:
    return int(config.num_attention_heads)


def _key_heads(config: PreTrainedConfig) -> int:
    return int(config.num_key_value_heads)


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """One architecture of llama.cpp.

    Attributes:
        name: `general.architecture`.
        modules: GGUF's name of a layer inside its block → path of the module, `{}` for the block's
            number. Reading goes by this table, writing by that of the package gguf.
        row_orders: Of the layers whose rows are reordered, by GGUF's name.
    """

    name: str
    modules: Mapping[str, str]
    row_orders: Mapping[str, RowOrder] = field(default_factory=dict)


_LLAMA_MLP = {
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_LLAMA = {
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    **_LLAMA_MLP,
}
_PHI = {
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.dense",
    "ffn_up": "model.layers.{}.mlp.fc1",
    "ffn_down": "model.layers.{}.mlp.fc2",
}
_PHI3 = {
    "attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_up": "model.layers.{}.mlp.gate_up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_GPT2 = {
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
_GPT_NEOX = {
    "attn_qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "attn_output": "gpt_neox.layers.{}.attention.dense",
    "ffn_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "ffn_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
_ROTARY = {
    "attn_q": RowOrder(_query_heads, _pairs_together, _halves_apart),
    "attn_k": RowOrder(_key_heads, _pairs_together, _halves_apart),
}
_FUSED = {"attn_qkv": RowOrder(_query_heads, _queries_first, _head_by_head)}

# By `model_type` of the configuration.
ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", _LLAMA, _ROTARY),
    "mistral": GgufArchitecture("llama", _LLAMA, _ROTARY),
    "qwen2": GgufArchitecture("qwen2", _LLAMA),
    "qwen3": GgufArchitecture("qwen3", _LLAMA),
    "gemma3_text": GgufArchitecture("gemma3", _LLAMA),
    "phi": GgufArchitecture("phi2", _PHI),
    "phi3": GgufArchitecture("phi3", _PHI3),
    "gpt2": GgufArchitecture("gpt2", _GPT2),
    "gpt_neox": GgufArchitecture("gptneox", _GPT_NEOX, _FUSED),
}


def architecture_of(config: PreTrainedConfig) -> GgufArchitecture:
    """The architecture of a base model.

    Raises:
        AdapterError: None that was verified.
    """
    if config.model_type not in ARCHITECTURES:
        raise AdapterError(
            f"target {NAME}: expected a model of type {', '.join(ARCHITECTURES)}, got "
            f"{config.model_type}, whose layers in llama.cpp were not verified; export with "
            "--target merged and convert that with llama.cpp's convert_hf_to_gguf.py, or with "
            "--target peft"
        )
    return ARCHITECTURES[config.model_type]
