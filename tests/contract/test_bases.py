"""Every supported architecture: calibrated, attached, trained, exported, reloaded by peft alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import forgetless
from forgetless.adapters.forms import adapted_layers
from forgetless.adapters.round_trip import check_round_trip
from forgetless.calibration import memory
from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.data.pairs import make_pair_batches
from forgetless.data.tokens import TokenRow, make_batches
from forgetless.errors import (
    AdapterError,
    CalibrationError,
    DataError,
    ForgetlessWarning,
    ModelError,
)
from forgetless.evaluation import likelihood, movement
from forgetless.models.targets import Target, find_targets
from tiny_bases import CAUSAL, CONFIGS, ENCODER_DECODERS, MIXTURES, tiny_base

TEXTS = [f"The capital of country {i} is city {i * 7 % 13}, and it rains there." for i in range(40)]
TRAIN = [f"Question: {i} apples and {i} apples? Answer: {2 * i} apples." for i in range(40)]
SPLIT = {"prompt": "{prompt}", "completion": "{completion}"}
FORMS = {"b": {"name": "lora-null"}, "both": {"name": "sc-lora"}}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
DENSE = {"gate_proj", "up_proj", "down_proj"}
BART_ATTENTION = {"q_proj", "k_proj", "v_proj", "out_proj"}
# Last parts of the adapted layers' names, and how many layers those are, counted by block.
ADAPTED: dict[str, tuple[set[str], int]] = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "gemma3"], (ATTENTION | DENSE, 2 * 7)),
    "phi": ({"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}, 2 * 6),
    "phi3": ({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, 2 * 4),
    "gpt2": ({"c_attn", "c_proj", "c_fc"}, 2 * 4),
    "gpt_neox": ({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, 2 * 4),
    "mixtral": (ATTENTION, 2 * 4),
    "qwen3_moe": (ATTENTION, 2 * 4),
    "qwen2_moe": (ATTENTION | DENSE, 2 * 7),
    "t5": ({"q", "k", "v", "o", "wi", "wo"}, 2 * (4 + 2) + 2 * (8 + 2)),
    "t5_gated": ({"q", "k", "v", "o", "wi_0", "wi_1", "wo"}, 2 * (4 + 3) + 2 * (8 + 3)),
    "bart": (BART_ATTENTION | {"fc1", "fc2"}, 2 * (4 + 2) + 2 * (8 + 2)),
}
pytestmark = pytest.mark.filterwarnings("ignore::forgetless.errors.ForgetlessWarning")


def data(name: str, texts: list[str]) -> object:
    """Texts; for an encoder-decoder split in two."""
    if name not in ENCODER_DECODERS:
        return texts
    records = [{"prompt": t[: len(t) // 2], "completion": t[len(t) // 2 :]} for t in texts]
    return {"examples": records, **SPLIT}


def attached(
    name: str, tokenizer: PreTrainedTokenizerBase, method: object, **more: object
) -> PeftModel:
    return forgetless.attach(
        tiny_base(name),
        tokenizer,
        method=method,  # type: ignore[arg-type]
        rank=4,
        preserve_data=data(name, TEXTS),
        train_data=data(name, TRAIN),
        **more,  # type: ignore[arg-type]
    )


def inputs(name: str) -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 29).reshape(2, 12)
    return {"input_ids": ids, "labels": ids.flip(1) if name in ENCODER_DECODERS else ids}


def logits(model: nn.Module, name: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs(name)).logits


def train_two_steps(model: PeftModel, name: str) -> set[str]:
    """Layers whose adapter got a nonzero gradient in the first step."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    touched: set[str] = set()
    for step in range(2):
        model(**inputs(name)).loss.backward()
        if step == 0:
            touched = {
                layer
                for layer, module in adapted_layers(model).items()
                if any(p.grad is not None and p.grad.any() for p in module.parameters())
            }
        optimizer.step()
        optimizer.zero_grad()
    return touched


@pytest.mark.compatibility(base="{name}", form="{form}", trainer="loop", export="peft")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_starts_at_the_base_trains_everywhere_and_reloads_with_peft_alone(
    name: str, form: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    untouched = tiny_base(name)
    expected = logits(untouched, name)
    model = attached(name, tiny_tokenizer, FORMS[form])
    layers = set(adapted_layers(model))
    assert ({layer.rpartition(".")[2] for layer in layers}, len(layers)) == ADAPTED[name]
    assert torch.equal(logits(model, name), expected)

    assert train_two_steps(model, name) == layers
    tuned = logits(model, name)
    assert (tuned - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model, name), expected)

    forgetless.export(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        reloaded = PeftModel.from_pretrained(untouched, str(tmp_path))
    torch.testing.assert_close(logits(reloaded, name), tuned, rtol=1e-4, atol=1e-5)
    with reloaded.disable_adapter():
        assert torch.equal(logits(reloaded, name), expected)


@pytest.mark.compatibility(base="{name}", form="plain", trainer="loop", export="merged")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_model_reloads_with_transformers_alone(
    name: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = attached(name, tiny_tokenizer, {"name": "lora"})
    train_two_steps(model, name)
    forgetless.save_merged(model, tmp_path)
    merged = type(tiny_base(name)).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged, name), logits(model, name), rtol=1e-4, atol=1e-5)


def token_rows(prompts: bool) -> list[TokenRow]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 11, 7, 16, 5, 2]
    return [
        TokenRow(
            tuple(torch.randint(4, 300, (n,), generator=generator).tolist()), prompts * (n + 1) // 3
        )
        for n in lengths
    ]


def naive_moments(
    model: PreTrainedModel, targets: dict[str, Target], run: list[Callable[[], object]]
) -> dict[str, torch.Tensor]:
    """Mean of x xᵀ at every layer, in float64, over single rows without padding."""
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in targets}
    for layer, target in targets.items():
        target.module.register_forward_pre_hook(
            lambda _m, args, layer=layer: seen[layer].append(args[0].flatten(0, -2).double())
        )
    with torch.no_grad():
        for call in run:
            call()
    joined = {layer: torch.cat(parts) for layer, parts in seen.items()}
    return {layer: x.T @ x / len(x) for layer, x in joined.items()}


def assert_same_moments(found: SiteMoments, expected: dict[str, torch.Tensor]) -> None:
    assert set(found.site_of) == set(expected)
    for layer, moment in expected.items():
        # Some architectures normalise and rotate in float32, whatever the model's dtype.
        difference = (found.of(layer).mean_DD().double() - moment).norm() / moment.norm()
        assert difference < 1e-5, layer


@pytest.mark.compatibility(base="{name}", feature="calibration")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_moments_of_padded_batches_equal_a_loop_over_rows(name: str, side: str) -> None:
    rows, base = token_rows(prompts=False), tiny_base(name)
    targets = find_targets(base).targets
    batches = make_batches(rows, batch_size=4, pad_token_id=2, padding_side=side)  # type: ignore[arg-type]
    found = collect_moments(base, targets, batches)
    calls = [functools.partial(base, input_ids=torch.tensor([row.input_ids])) for row in rows]
    assert_same_moments(found, naive_moments(base, targets, calls))


@pytest.mark.compatibility(base="{name}", feature="calibration")
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_moments_of_an_encoder_decoder_equal_a_loop_over_rows(name: str) -> None:
    rows, base = token_rows(prompts=True), tiny_base(name)
    targets = find_targets(base).targets
    found = collect_moments(base, targets, make_pair_batches(rows, batch_size=4, pad_token_id=2))
    start = base.config.decoder_start_token_id
    calls = []
    for row in rows:
        labels = row.input_ids[row.prompt_length :]
        calls.append(
            functools.partial(
                base,
                input_ids=torch.tensor([row.input_ids[: row.prompt_length]]),
                decoder_input_ids=torch.tensor([[start, *labels[:-1]]]),
            )
        )
    assert_same_moments(found, naive_moments(base, targets, calls))


@pytest.mark.compatibility(base="{name}", feature="evaluation")
@pytest.mark.parametrize("name", CAUSAL)
def test_evaluation_does_not_depend_on_the_padding_side(
    name: str, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(name, tiny_tokenizer, {"name": "lora"})
    train_two_steps(model, name)
    texts = ["Iron.", *TEXTS[:2], "The dog sleeps on and on and on."]

    def figures() -> list[float]:
        item = {"name": "kept", "examples": texts, "metrics": ["nll", "kl"]}
        report = forgetless.evaluate(model, tiny_tokenizer, retention=[item])
        moved = report.movement
        assert moved is not None
        assert set(moved.layers) == set(adapted_layers(model))
        metrics = report.items[0].metrics
        return [
            *(metrics["nll"].base.mean, metrics["nll"].tuned.mean, metrics["kl"].tuned.mean),
            *(moved.update_size, moved.drift, moved.leakage),
        ]

    right = figures()
    assert min(right) > 1e-6
    for module in (likelihood, movement):
        left_padded = functools.partial(make_batches, padding_side="left")
        monkeypatch.setattr(module, "make_batches", left_padded)
    assert figures() == pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_and_routers_are_skipped_aloud(
    name: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.warns(ForgetlessWarning, match="get no adapter and stay as they are") as caught:
        attached(name, tiny_tokenizer, {"name": "lora"})
    said = next(str(w.message) for w in caught if "get no adapter" in str(w.message))
    assert "mlp.experts" in said
    assert "mlp.gate " in said
    assert "fused 3-D weights" in said


def test_a_layer_that_peft_takes_for_an_expert_is_skipped_aloud_and_refused_by_name(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    base = tiny_base("qwen3_moe")
    skipped = find_targets(base).unexpected_skips()
    for layer in DENSE:
        assert "PEFT takes this name" in skipped[f"model.layers.0.mlp.{layer}"]
    with pytest.raises(AdapterError, match=r"'down_proj' names .*layers\.0\.mlp\.down_proj"):
        find_targets(base, ["q_proj", "down_proj"])


def test_a_gate_with_one_output_is_skipped_aloud() -> None:
    skipped = find_targets(tiny_base("qwen2_moe")).unexpected_skips()
    assert "single output" in skipped["model.layers.0.mlp.shared_expert_gate"]


def test_an_encoder_decoder_says_which_data_it_needs(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    base = tiny_base("t5")
    attach = functools.partial(forgetless.attach, base, tiny_tokenizer, rank=4)
    with pytest.raises(DataError, match=r"expected a prompt .* and a completion .* row 0"):
        attach(preserve_data=TEXTS)
    with pytest.raises(DataError, match="expected a causal language model to sample from"):
        attach(preserve_data="self")
    spec = data("t5", TEXTS)
    assert isinstance(spec, dict)
    with pytest.raises(DataError, match="tokens: all for an encoder-decoder"):
        attach(preserve_data={**spec, "tokens": "completion"})


def test_keys_and_values_of_all_cross_attention_share_the_encoders_result() -> None:
    base = tiny_base("t5")
    batches = make_pair_batches(token_rows(prompts=True), batch_size=4, pad_token_id=2)
    found = collect_moments(base, find_targets(base).targets, batches)
    cross = [n for n in found.site_of if n.endswith(("EncDecAttention.k", "EncDecAttention.v"))]
    assert len(cross) == 4
    assert len({found.site_of[name] for name in cross}) == 1
    # In each block: encoder qkv, o, wi, wo; decoder the same and cross-attention's q, o.
    assert len(found.moments) == 2 * 4 + 2 * 6 + 1


def test_too_few_tokens_on_one_side_of_an_encoder_decoder_are_refused(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    records = [{"prompt": text, "completion": "a"} for text in TEXTS[:15]]  # BOS and `a`: 30 tokens
    spec = {"examples": records, **SPLIT}
    with pytest.raises(CalibrationError, match=r"at least 64 .* \(site decoder.*, got 30, 34 miss"):
        forgetless.attach(tiny_base("t5"), tiny_tokenizer, rank=4, preserve_data=spec)


def test_moments_of_an_encoder_decoder_beyond_the_free_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_base("t5")
    needed = 4 * ((2 * 3 + 2 * 5 + 1) * 32 * 33 + 4 * 64 * 65)
    batches = list(make_pair_batches(token_rows(prompts=True), batch_size=4, pad_token_id=2))
    monkeypatch.setattr(memory, "free_memory", lambda _device: needed)
    collect_moments(base, find_targets(base).targets, batches)
    monkeypatch.setattr(memory, "free_memory", lambda _device: needed - 1)
    with pytest.raises(CalibrationError, match="moments of 21 sites"):
        collect_moments(base, find_targets(base).targets, batches)


def test_an_encoder_decoder_that_reads_no_text_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_base("t5")
    monkeypatch.setattr(type(base), "main_input_name", "input_features")
    batches = make_pair_batches(token_rows(prompts=True), batch_size=4, pad_token_id=2)
    with pytest.raises(CalibrationError, match="from text to text"):
        collect_moments(base, find_targets(base).targets, batches)


def test_an_export_of_an_encoder_decoder_passes_the_round_trip(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = attached("t5", tiny_tokenizer, {"name": "sc-lora"})
    train_two_steps(model, "t5")
    trip = check_round_trip(model, forgetless.export(model, tmp_path), inputs("t5")["input_ids"])
    assert trip.max_difference < 1e-5 * max(trip.max_logit, 1)


@pytest.mark.compatibility(
    base="{name}",
    feature="evaluation",
    refused="measure an encoder-decoder in your own code; attach, export and load_adapter work",
)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_cannot_be_evaluated_yet_and_says_what_works(
    name: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = attached(name, tiny_tokenizer, {"name": "lora"})
    with pytest.raises(ModelError, match=r"got \w+ForConditionalGeneration.*export"):
        forgetless.evaluate(model, tiny_tokenizer, retention=[TEXTS])


def collected_again(*arguments: object, **keywords: object) -> NoReturn:
    raise AssertionError("moments are collected though the cache has them")


def test_moments_of_an_encoder_decoder_are_taken_from_the_cache(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = attached("t5", tiny_tokenizer, {"name": "lora-null"}, cache=tmp_path)
    monkeypatch.setattr("forgetless.calibration.calibrate.collect_moments", collected_again)
    second = attached("t5", tiny_tokenizer, {"name": "lora-null"}, cache=tmp_path)
    expected = get_peft_model_state_dict(first)
    for key, tensor in get_peft_model_state_dict(second).items():
        assert torch.equal(tensor, expected[key]), key
