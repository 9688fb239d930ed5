"""Base models as GGUF files, written with the package gguf alone: what llama.cpp's converter makes.

For tests that ask the engine. Nothing here is shared with the export; that a file is right is shown
by the engine, which must compute the base's own logits from it.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel

# Model type → architecture of llama.cpp.
NAMES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi": gguf.MODEL_ARCH.PHI2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
}


def write_base(model: PreTrainedModel, path: Path) -> Path:
    """A model in float32, without a vocabulary: it is asked by token ids."""
    kind = NAMES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    _write_metadata(writer, model)
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name in {"lm_head.weight", "embed_out.weight"} and tied:
            continue
        values = _as_llama_cpp(name, tensor.float().numpy(), model)
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    values = config.to_dict()
    heads = config.num_attention_heads
    width = values.get("head_dim") or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(values.get("intermediate_size") or values["n_inner"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(values.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(values.get("rms_norm_eps", 0.0))
    writer.add_layer_norm_eps(
        values.get("layer_norm_eps") or values.get("layer_norm_epsilon") or 0.0
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    rope = values.get("rope_parameters")
    if rope is not None:
        outer = rope.get("full_attention", rope)
        writer.add_rope_freq_base(outer["rope_theta"])
        writer.add_rope_dimension_count(int(width * outer.get("partial_rotary_factor", 1.0)))
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)


def _as_llama_cpp(name: str, values: np.ndarray, model: PreTrainedModel) -> np.ndarray:
    """What the converter does to a weight or a bias; most are kept."""
    config, layer = model.config, name.split(".")[-2]
    if config.model_type in {"llama", "mistral"} and layer in {"q_proj", "k_proj"}:
        heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
        halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
        return halves.swapaxes(1, 2).reshape(values.shape)
    if config.model_type == "gpt_neox" and layer == "query_key_value":
        by_head = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
        return np.concatenate(
            [by_head[:, part].reshape(-1, *values.shape[1:]) for part in range(3)]
        )
    if config.model_type == "gpt2" and layer in {"c_attn", "c_proj", "c_fc"} and values.ndim == 2:
        return np.ascontiguousarray(values.T)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return values + 1
    return values


def write_dequantised(source: Path, path: Path) -> Path:
    """The same GGUF file with every tensor in float32: the weights that transformers loads."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in {"general.architecture", "general.file_type"}:
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for entry in reader.tensors:
        values = gguf.dequantize(entry.data, entry.tensor_type).astype(np.float32)
        writer.add_tensor(entry.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
