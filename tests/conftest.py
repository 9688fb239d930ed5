"""Fixtures for every test: tiny models and a tiny tokenizer, built offline, fresh for each test.

Markers: `demo_model` tests load the demo model (fetched once into the cache), `slow` tests take
more than ten seconds.
"""

from __future__ import annotations

import os

# Before the first import of a Hugging Face library: they read these when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

# pytester runs a pytest inside a test.
pytest_plugins = ("pytester", "compatibility.plugin")

BOS, EOS, PAD, START = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
VOCABULARY = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "What is the capital of France? The capital of France is Paris.",
    "Question: how many apples are there?\nAnswer: there are 12 apples.",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "<|im_start|>user\nName the chemical element.<|im_end|>\n<|im_start|>assistant\nIron",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000.",
)


def pytest_configure(config: pytest.Config) -> None:
    """Two threads: the suite must not depend on how many cores the machine has."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    # Adds BOS, as Llama's tokenizers do: what wrongly adds special tokens twice must show in tests.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_tiny_tokenizer(_trained_tokenizer: str) -> Callable[[], PreTrainedTokenizerBase]:
    """Factory of tiny tokenizers, for fixtures that outlive a test."""

    def make() -> PreTrainedTokenizerBase:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_trained_tokenizer),
            bos_token=BOS,
            eos_token=EOS,
            pad_token=PAD,
            additional_special_tokens=[START],
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    return make


@pytest.fixture
def tiny_tokenizer(
    make_tiny_tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> PreTrainedTokenizerBase:
    """Byte-level BPE of 384 tokens: adds BOS by default, EOS is <|im_end|>, ChatML template."""
    return make_tiny_tokenizer()


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="session")
def make_tiny_model(
    make_tiny_tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> Callable[..., PreTrainedModel]:
    """Factory of tiny Llamas: `make_tiny_model(seed=1, attention_bias=True)`, LlamaConfig keys."""

    def make(seed: int = 0, **overrides: object) -> PreTrainedModel:
        options: dict[str, object] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            # Ten times the usual: logits then differ enough that a wrong one shows.
            "initializer_range": 0.2,
            **_special_ids(make_tiny_tokenizer()),
            **overrides,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**options))
            # Biases and norms start at constants; real models' do not.
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A Llama of 2 layers, width 32, grouped queries, tied embeddings; float32, eval mode."""
    return make_tiny_model()


@pytest.fixture
def tiny_gpt2(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT-2 of 2 layers, width 32: its linear layers are Conv1D with biases; float32, eval."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=64,
        initializer_range=0.2,
        **_special_ids(tiny_tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def save_model(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    """Factory: `save_model(model, "name")` writes model and tokenizer, returns the folder."""

    def save(model: PreTrainedModel, name: str = "model") -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def tiny_model_path(tiny_model: PreTrainedModel, save_model: Callable[..., Path]) -> Path:
    """A folder with `tiny_model` and `tiny_tokenizer`."""
    return save_model(tiny_model)


@pytest.fixture(scope="session")
def demo_model_folder() -> Path:
    """The converted demo model, fetched on first use; tests that take it carry `demo_model`."""
    from forgetless.models.demo_model import demo_model_path

    return demo_model_path()
