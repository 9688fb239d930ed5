"""Calibration in several passes, and of a model that is kept elsewhere, equals that in one pass."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import forgetless
from forgetless.adapters.attach import Attached, attach_rows
from forgetless.calibration.engine import collect_moments
from forgetless.calibration.memory import moment_bytes, plan_calibration, refuse_beyond_memory
from forgetless.data.loading import load_rows
from forgetless.data.spec import parse_data
from forgetless.data.tokens import TokenRow, make_batches
from forgetless.errors import AdapterError, CalibrationError
from forgetless.linalg.moments import SecondMoment
from forgetless.methods import make_method
from forgetless.models.fingerprint import model_fingerprint, rounded_fingerprint
from forgetless.models.targets import Target, find_targets
from forgetless.processes import Processes
from tiny_bases import tiny_base

WORDS = ("sea", "is", "wide", "and", "hills", "green", "while", "small", "boats", "go", "out", "at")


def texts(seed: int, count: int = 40) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, 14), generator=generator)
    return [" ".join(WORDS[int(i)] for i in row) + f" {seed}" for row in picks]


def pairs(seed: int) -> dict[str, object]:
    rows = [{"prompt": text, "completion": f" {text[::-1]}"} for text in texts(seed)]
    return {"examples": rows, "prompt": "{prompt}", "completion": "{completion}"}


def attached(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Any, **keys: Any
) -> Attached:
    make = pairs if model.config.is_encoder_decoder or method["name"] == "lora-ga" else texts
    made = make_method(method, 4)
    row_sets: dict[Any, Any] = {
        role: [
            load_rows(spec, tokenizer, model=model)
            for seed in seeds
            for spec in parse_data(make(seed))
        ]
        for role, seeds in (("train", (1,)), ("preserve", (2, 3)))
        if role in made.reads
    }
    return attach_rows(model, tokenizer, method=made, row_sets=row_sets, seed=5, **keys)


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


METHODS = [
    {"name": "lora-null"},
    {"name": "lora-null", "trains": "both"},
    {"name": "sc-lora"},
    {"name": "contrastive"},
    {"name": "lora-ga"},
]


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(m.values()))
def test_a_third_of_the_memory_gives_the_same_adapter(
    base: str, method: dict[str, str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    if base == "t5" and method["name"] == "lora-ga":
        pytest.skip("takes no encoder-decoder")
    once = attached(tiny_base(base), tiny_tokenizer, method)
    assert once.passes == (0 if method["name"] == "lora-ga" else 1)
    budget = once.moment_bytes // 3  # the widest sites take that much
    often = attached(tiny_base(base), tiny_tokenizer, method, memory_budget=budget)
    if once.passes:
        assert often.passes >= 3
        assert often.moment_bytes <= budget
    assert often.starts == once.starts
    assert list(often.starts) == list(once.starts)
    assert often.calibrated == once.calibrated
    assert often.origin == once.origin
    expected = adapter_of(once.model)
    for name, tensor in adapter_of(often.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_moments_of_several_passes_are_read_from_the_cache_where_they_are_asked_for(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    null = {"name": "lora-null"}
    once = attached(tiny_base("llama"), tiny_tokenizer, null)
    for weights in ("tokens", "equal"):
        keys: dict[str, Any] = {"source_weights": weights, "cache": tmp_path}
        keys["memory_budget"] = once.moment_bytes // 3
        often = attached(tiny_base("llama"), tiny_tokenizer, null, **keys).moments["preserve"]
        again = attached(tiny_base("llama"), tiny_tokenizer, null, source_weights=weights)
        expected = again.moments["preserve"]
        assert often.site_of == expected.site_of
        assert set(often.moments) == set(expected.moments)
        assert len(often.moments) == 8
        for site, moment in expected.moments.items():
            torch.testing.assert_close(often.moments[site].mean_DD(), moment.mean_DD())
            assert often.moments[site].num_tokens == moment.num_tokens


def test_without_a_cache_moments_that_a_regulariser_asks_for_stay(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    budget = attached(tiny_base("llama"), tiny_tokenizer, METHODS[0]).moment_bytes // 3
    gone = attached(tiny_base("llama"), tiny_tokenizer, METHODS[0], memory_budget=budget)
    assert "preserve" not in gone.moments
    kept = attached(
        tiny_base("llama"),
        tiny_tokenizer,
        METHODS[0],
        memory_budget=budget,
        also=frozenset({"preserve"}),
    )
    assert len(kept.moments["preserve"].moments) == 8


def test_a_pass_ends_after_the_last_layer_of_its_group() -> None:
    model = tiny_base("llama")
    targets = find_targets(model).targets
    plan = plan_calibration(model, targets, budget=17_000)  # the widest site takes 16,640
    assert len(plan.groups) > 2
    first = plan.groups[0]
    assert all(name.startswith("model.layers.0.") for name in first)
    reached: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: reached.append(name))
    rows = [TokenRow((5, 6, 7), 0), TokenRow((8, 9), 0)]
    batches = make_batches(rows, batch_size=1, pad_token_id=2)
    collect_moments(model, first, batches, order=plan.order)
    assert reached.count("model.embed_tokens") == 2
    assert not any(name.startswith("model.layers.1") for name in reached)
    last_called = plan.order.of(first)[-1]
    assert last_called not in reached  # not even the layer whose input was the last to be wanted


def test_layers_that_read_one_tensor_stay_together() -> None:
    model = tiny_base("llama")
    targets = find_targets(model).targets
    plan = plan_calibration(model, targets, budget=17_000)  # the widest site takes 16,640
    assert sorted(name for group in plan.groups for name in group) == sorted(targets)
    group_of = {name: i for i, group in enumerate(plan.groups) for name in group}
    for name, site in plan.order.site_of.items():
        assert group_of[name] == group_of[site]


def test_the_group_that_is_not_full_is_the_first_whose_pass_is_the_shortest() -> None:
    model = tiny_base("llama")
    targets, budget = find_targets(model).targets, 17_000
    plan = plan_calibration(model, targets, budget=budget)

    def sites(group: dict[str, Target]) -> list[str]:
        return list(dict.fromkeys(plan.order.site_of[name] for name in plan.order.of(group)))

    def size(site: str) -> int:
        width = targets[site].in_features
        return 4 * width * (width + 1)

    for before, group in itertools.pairwise(plan.groups):
        taken = sum(size(site) for site in sites(group))
        assert taken <= budget < taken + size(sites(before)[-1])


def test_a_site_that_is_larger_than_the_budget_is_named(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(CalibrationError, match=r"down_proj alone, 64 wide, .* in memory_budget"):
        attached(tiny_base("llama"), tiny_tokenizer, METHODS[0], memory_budget=1000)


@pytest.mark.parametrize("given", ["much", 0, -1, True, "0GiB", [1]])
def test_what_is_no_size_is_refused(
    given: Any, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(AdapterError, match="memory_budget: expected bytes, such as 8GiB"):
        forgetless.attach(tiny_model, tiny_tokenizer, preserve_data=texts(0), memory_budget=given)


def test_a_layer_that_is_called_twice_is_seen_twice() -> None:
    """A stack that runs one block twice, as some models do: no pass may end at the first call."""
    model = tiny_base("llama")
    model.model.layers[1] = model.model.layers[0]
    targets = find_targets(model).targets
    rows = [TokenRow((5, 6, 7, 11), 0)]
    found = collect_moments(model, targets, make_batches(rows, batch_size=1, pad_token_id=2))
    seen: dict[str, SecondMoment] = {}

    def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        moment = seen.setdefault("down", SecondMoment.zeros(args[0].shape[-1]))
        moment.add_(args[0].detach()[0])

    name = "model.layers.0.mlp.down_proj"
    targets[name].module.register_forward_pre_hook(add)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 11]]), use_cache=False)
    assert found.of(name).num_tokens == seen["down"].num_tokens == 8
    torch.testing.assert_close(found.of(name).mean_DD(), seen["down"].mean_DD())


OFFLOADED = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: "-".join(m.values()))
def test_a_base_that_lies_on_disk_gets_the_same_adapter(
    tmp_path: Path, method: dict[str, str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "model")
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=OFFLOADED, offload_folder=tmp_path / "away"
    )
    assert any(p.is_meta for p in away.parameters())
    here = attached(base, tiny_tokenizer, method)
    there = attached(away, tiny_tokenizer, method, memory_budget=here.moment_bytes // 2)
    assert model_fingerprint(there.model) == model_fingerprint(here.model)
    assert rounded_fingerprint(there.model) == rounded_fingerprint(here.model)
    expected = adapter_of(here.model)
    for name, tensor in adapter_of(there.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    ids = torch.tensor([[5, 6, 7, 11]])
    there.model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in there.model.parameters() if p.requires_grad and p.grad is not None]
    assert any(bool(p.grad.any()) for p in trained)
    forgetless.export(there.model, tmp_path / "export")
    assert (tmp_path / "export/adapter_model.safetensors").exists()


def test_processes_on_one_machine_divide_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_base("llama")
    targets = find_targets(model).targets
    order = plan_calibration(model, targets).order
    needed = moment_bytes(targets, {order.site_of[name] for name in targets}, torch.float32)
    monkeypatch.setattr("forgetless.calibration.memory.free_memory", lambda _: needed)
    refuse_beyond_memory(model, targets, order)
    with pytest.raises(CalibrationError, match="of free memory for the moments"):
        refuse_beyond_memory(model, targets, order, Processes(on_this_machine=2))
