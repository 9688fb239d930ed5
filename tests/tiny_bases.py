"""Tiny random models of the architectures that are supported, all of 2 layers and width 32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

IDS = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES: dict[str, object] = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Ten times the usual: logits then differ enough that a wrong one shows.
    "initializer_range": 0.2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2_SIZES = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART_SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
    "init_std": 0.2,
    "decoder_start_token_id": 1,
}

# Windows of 8 tokens: shorter than the texts of the tests.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": lambda: PhiConfig(**SIZES),
    "phi3": lambda: Phi3Config(**GROUPED),
    "gpt2": lambda: GPT2Config(**IDS, **GPT2_SIZES, initializer_range=0.2),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    # The first layer is dense, the second a mixture.
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **GROUPED, **EXPERTS, head_dim=8, num_experts=4, mlp_only_layers=[0]
    ),
    # Each layer has an expert that every token passes, and a gate for it.
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=32
    ),
    "t5": lambda: T5Config(**IDS, **T5_SIZES, decoder_start_token_id=2),
    # As T5 of version 1.1 and FLAN: gated, no tied head.
    "t5_gated": lambda: T5Config(
        **IDS,
        **T5_SIZES,
        decoder_start_token_id=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "bart": lambda: BartConfig(**IDS, **BART_SIZES),
}
ENCODER_DECODERS = ("t5", "t5_gated", "bart")
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe")
CAUSAL = tuple(name for name in CONFIGS if name not in ENCODER_DECODERS)


def tiny_base(name: str) -> PreTrainedModel:
    """The same weights each time; float32, eval mode."""
    config = CONFIGS[name]()
    loader = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = loader.from_config(config)
        # Biases and norms start at constants; real models' do not.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()
