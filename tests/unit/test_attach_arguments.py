"""What `attach` refuses before anything slow begins, and what it says aloud."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.adapters.attach import attach
from forgetless.errors import AdapterError, DataError, ForgetlessWarning

TEXTS = [f"The capital of country {i} is city {i * 7 % 13}." for i in range(30)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"^batch_size: expected a whole number, 1 or more, got 0"),
        ({"batch_size": 2.5}, r"^batch_size: .*got 2\.5"),
        ({"batch_size": True}, r"^batch_size: .*got True"),
        ({"source_weights": "rows"}, r"^source_weights: expected tokens or equal, got 'rows'"),
        ({"min_tokens": 0}, r"^min_tokens: .*got 0"),
        ({"seed": -1}, r"^seed: expected a whole number, 0 to 2\*\*63 - 1, got -1"),
        ({"seed": 2**63}, r"^seed: "),
        ({"adapter": ""}, r"^adapter: expected a name .*got ''"),
        ({"adapter": "a.b"}, r"^adapter: .*'a\.b'"),
        ({"adapter": "keys"}, r"^adapter: .*'keys'"),
        ({"adapter": "half"}, r"^adapter: .*'half'"),
        ({"adapter": "lora_A"}, r"^adapter: .*'lora_A'"),
        ({"adapter": None}, r"^adapter: .*None"),
        ({"targets": "q_proj"}, r"^targets: expected a list of module names, got 'q_proj'"),
        ({"targets": []}, r"^targets: expected a list of module names, got \[\]"),
    ],
)
def test_an_argument_that_would_fail_later_is_refused_by_name(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(AdapterError, match=message) as error:
        attach(tiny_model, tiny_tokenizer, method="lora", rank=2, **options)
    assert "\n" not in str(error.value)


def test_a_cache_that_is_a_file_is_refused(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(AdapterError, match=r"^cache: expected a folder, got the file"):
        attach(tiny_model, tiny_tokenizer, method="lora", cache=tmp_path / "cache")


def test_swapped_or_missing_model_and_tokenizer_get_one_line(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    wrong: list[tuple[Any, Any, str]] = [
        (tiny_tokenizer, tiny_model, "^model: expected a transformers model"),
        (None, tiny_tokenizer, "^model: .*got NoneType"),
        (tiny_model, None, "^tokenizer: .*got NoneType"),
        (nn.Linear(2, 2), tiny_tokenizer, "^model: .*got Linear"),
    ]
    for model, tokenizer, message in wrong:
        with pytest.raises(AdapterError, match=message):
            attach(model, tokenizer, method="lora")


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_in_range_works(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    model = attach(tiny_model, tiny_tokenizer, method="lora", rank=2, seed=seed, adapter="task-1")
    assert isinstance(model, PeftModel)


def test_a_row_in_both_roles_is_refused_whatever_its_white_space(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match="preserve and train data: expected no row in both"):
        attach(
            tiny_model,
            tiny_tokenizer,
            method="sc-lora",
            rank=2,
            preserve_data=TEXTS,
            train_data=[f"Row {i}" for i in range(9)] + [TEXTS[3].replace(" ", "  ") + " \n"],
        )
    # Plain LoRA calibrates on neither: what it does not read cannot overlap.
    attach(tiny_model, tiny_tokenizer, method="lora", rank=2, preserve_data=TEXTS, train_data=TEXTS)


class Fused(nn.Module):
    """Stand-in for fused expert weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, 4))


def test_layers_that_get_no_adapter_are_named_in_one_warning(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_tiny_model(num_hidden_layers=4)
    for layer in model.model.layers:
        layer.mlp.experts = Fused()
    with pytest.warns(ForgetlessWarning) as heard:
        attach(model, tiny_tokenizer, method="lora", rank=2)
    (message,) = [str(w.message) for w in heard if w.category is ForgetlessWarning]
    assert message.startswith("attach: 4 layers with weights get no adapter")
    assert "as they are: model.layers.0.mlp.experts, model.layers.1.mlp.experts, " in message
    assert "model.layers.2.mlp.experts and 1 more (Fused: fused 3-D weights" in message
    assert "lm_head" not in message
    assert "embed_tokens" not in message


def test_the_head_and_embeddings_are_no_news(
    tiny_gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgetlessWarning)
        attach(tiny_gpt2, tiny_tokenizer, method="lora", rank=2)
