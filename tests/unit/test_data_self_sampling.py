"""Self samples come from the bare base model, are repeatable, and leave no trace behind."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.data import DataSpec, Row, load_rows, sample_self
from forgetless.errors import DataError

SMALL = {"rows": 3, "max_length": 16, "seed": 5, "batch_size": 4}
PREFIX = "<|im_start|>user\n"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are tiny: on a busy machine a second thread is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sample(model: Any, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> list[Row]:
    return sample_self(model, tokenizer, **{**SMALL, "cache": None, **changes})


def adapted(model: PreTrainedModel) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def test_rows_open_a_users_turn_and_hold_all_special_tokens(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = sample(tiny_model, tiny_tokenizer)
    assert len(rows) == 3
    assert len({row.text for row in rows}) == 3
    for row in rows:
        assert row.prompt == ""
        assert row.templated
        assert row.text.startswith(PREFIX)
        assert len(row.text) > len(PREFIX)


def test_a_tokenizer_without_chat_template_begins_with_its_first_token(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_tokenizer.chat_template = None
    assert sample(tiny_model, tiny_tokenizer)[0].text.startswith("<|bos|>")
    tiny_tokenizer.bos_token = tiny_tokenizer.eos_token = None
    with pytest.raises(DataError, match="beginning-of-sequence"):
        sample(tiny_model, tiny_tokenizer)


def test_the_seed_decides_and_fewer_rows_are_the_beginning_of_more(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(1)
    first = sample(tiny_model, tiny_tokenizer)
    torch.manual_seed(2)
    assert sample(tiny_model, tiny_tokenizer) == first
    assert sample(tiny_model, tiny_tokenizer, seed=6) != first
    assert sample(tiny_model, tiny_tokenizer, rows=7)[:3] == first


def test_the_callers_state_is_left_as_it_was(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = adapted(tiny_model)
    model.train()
    model.base_model.model.model.layers[0].mlp.eval()
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    settings = tiny_model.generation_config
    random_state = torch.get_rng_state()
    sample(model, tiny_tokenizer)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert tiny_model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), random_state)


def test_state_is_restored_when_sampling_fails(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    tiny_model.train()
    settings = tiny_model.generation_config
    monkeypatch.setattr(tiny_model, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        sample(tiny_model, tiny_tokenizer)
    assert tiny_model.training
    assert tiny_model.generation_config is settings


def test_an_adapter_is_switched_off(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = sample(tiny_model, tiny_tokenizer)
    assert sample(adapted(tiny_model), tiny_tokenizer) == expected


def test_a_models_own_generation_settings_do_not_bend_the_samples(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = sample(tiny_model, tiny_tokenizer)
    tiny_model.generation_config.update(
        repetition_penalty=1.9, top_p=0.1, min_p=0.5, temperature=0.1, no_repeat_ngram_size=2
    )
    tiny_model.generation_config.suppress_tokens = list(range(100))
    assert sample(tiny_model, tiny_tokenizer) == expected


def test_first_tokens_follow_the_models_own_distribution(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Frequencies of 4,096 draws against the softmax of a plain forward pass."""
    prefix_ids = tiny_tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = tiny_model(torch.tensor([prefix_ids])).logits[0, -1]
    expected = torch.softmax(logits.double(), -1)
    draws = 4096
    rows = sample(
        tiny_model, tiny_tokenizer, rows=draws, max_length=len(prefix_ids) + 1, batch_size=draws
    )
    counts = Counter(row.text for row in rows)
    # Tokens that are half a character have no text of their own to count.
    texts = {token: tiny_tokenizer.decode([token]) for token in expected.argsort().tolist()}
    readable = [token for token, text in texts.items() if text.isascii()]
    for token in readable[-5:]:
        share = counts[PREFIX + texts[token]] / draws
        chance = expected[token].item()
        assert chance > 0.01
        assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / draws)


def test_the_cache_is_used_for_the_same_model_and_settings_only(
    make_tiny_model: Any, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = make_tiny_model()
    first = sample(model, tiny_tokenizer, cache=tmp_path)
    (file,) = tmp_path.glob("self-*")
    content = json.loads(file.read_text())
    content["texts"][0] = "from the cache"
    file.write_text(json.dumps(content))
    assert sample(model, tiny_tokenizer, cache=tmp_path)[0].text == "from the cache"
    assert sample(adapted(make_tiny_model()), tiny_tokenizer, cache=tmp_path)[0].text == (
        "from the cache"
    )
    other = make_tiny_model(seed=1)
    assert sample(other, tiny_tokenizer, cache=tmp_path)[0].text != "from the cache"
    for change in ({"seed": 6}, {"max_length": 17}, {"batch_size": 5}):
        assert sample(model, tiny_tokenizer, cache=tmp_path, **change)[0].text != "from the cache"
    tiny_tokenizer.chat_template = None
    assert sample(model, tiny_tokenizer, cache=tmp_path)[0].text != "from the cache"
    assert first == sample(make_tiny_model(), _with_template(tiny_tokenizer))


def test_more_rows_go_on_from_the_kept_ones(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    fresh = sample(tiny_model, tiny_tokenizer, rows=7)
    assert sample(tiny_model, tiny_tokenizer, rows=2, cache=tmp_path) == fresh[:2]
    assert sample(tiny_model, tiny_tokenizer, rows=7, cache=tmp_path) == fresh
    assert sample(tiny_model, tiny_tokenizer, rows=3, cache=tmp_path) == fresh[:3]
    assert len(list(tmp_path.glob("self-*"))) == 1


def _with_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("damage", ["truncated", "empty", "other settings", "too few", "no JSON"])
def test_a_damaged_cache_file_is_sampled_again_aloud(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    damage: str,
) -> None:
    expected = sample(tiny_model, tiny_tokenizer, cache=tmp_path)
    (file,) = tmp_path.glob("self-*")
    text = file.read_text()
    content = json.loads(text)
    file.write_text(
        {
            "truncated": text[: len(text) // 2],
            "empty": "",
            "other settings": json.dumps(content | {"settings": {}}),
            "too few": json.dumps(content | {"texts": content["texts"][:1]}),
            "no JSON": "\0\0",
        }[damage]
    )
    with pytest.warns(UserWarning, match="sampled again"):
        assert sample(tiny_model, tiny_tokenizer, cache=tmp_path) == expected
    assert json.loads(file.read_text()) == content


def test_a_cache_that_cannot_be_written_costs_a_warning_only(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(UserWarning, match="could not be kept|sampled again"):
        rows = sample(tiny_model, tiny_tokenizer, cache=blocked)
    assert len(rows) == 3


def test_no_room_behind_the_prefix_is_refused(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match="raise max_length"):
        sample(tiny_model, tiny_tokenizer, max_length=3)


def test_progress_tells_rows_done_of_rows_in_all(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    told: list[tuple[int, int]] = []
    sample(tiny_model, tiny_tokenizer, rows=6, progress=lambda *done: told.append(done))
    assert told == [(4, 6), (6, 6)]


def test_a_spec_takes_its_range_of_the_samples(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def load(**keys: Any) -> tuple[Row, ...]:
        spec = DataSpec(self_sampled=True, max_length=16, **keys)
        return load_rows(spec, tiny_tokenizer, model=tiny_model).rows

    whole = load(limit=6)
    assert len(whole) == 6
    assert load(rows=(2, 5)) == whole[2:5]
    assert set(load(rows=(0, 3))).isdisjoint(load(rows=(3, 6)))
    assert len(load()) == 64
