"""Quantised bases: calibrated on, adapted, trained, measured, exported, left as they are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import forgetless
from forgetless.adapters.export import EXPORT_TARGETS
from forgetless.adapters.export_target import ExportJob
from forgetless.adapters.forms import adapted_layers, factors, form_of
from forgetless.adapters.lint import lint_adapter
from forgetless.adapters.load import load_adapter
from forgetless.adapters.round_trip import check_round_trip
from forgetless.errors import AdapterError, ForgetlessWarning, ModelError
from forgetless.evaluation.weight_movement import measure_weights
from forgetless.models.bitsandbytes_cpu import keep_trainable_layout
from forgetless.models.fingerprint import model_fingerprint, unquantized_fingerprint
from forgetless.models.load import load_model
from forgetless.models.quantization import QUANTIZERS
from forgetless.models.targets import find_targets
from forgetless.recipe import Recipe
from quantized_bases import NAMES, cells, gptq_base, independent_weight, needed
from tiny_bases import tiny_base

TEXTS = [f"The capital of country {i} is city {i * 7 % 13}, and it rains there." for i in range(60)]
TRAIN = [f"Question: {i} apples and {i} apples? Answer: {2 * i} apples." for i in range(40)]
IDS = torch.arange(5, 29).reshape(2, 12)
# What neighbouring codes are apart, as a share of the weights' norm: 4 bits and 8 bits.
ERROR = {"nf4": (0.05, 0.15), "int8": (0.003, 0.012), "torchao-int8": (0.003, 0.012)}
CALLING = [name for name in QUANTIZERS if name != "torchao-int8"]
pytestmark = [
    # Libraries on CPUs: bitsandbytes casts inside, torch warns of torchao's enums.
    pytest.mark.filterwarnings("ignore::UserWarning:(bitsandbytes|torchao|peft|torch).*"),
    pytest.mark.filterwarnings("ignore::forgetless.errors.ForgetlessWarning"),
]


@pytest.fixture
def source(
    make_tiny_model: Callable[..., PreTrainedModel], save_model: Callable[..., Path]
) -> Path:
    """A full-precision Llama with biases, wide enough that a row has several blocks of scales."""
    wide = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": True}
    return save_model(make_tiny_model(**wide), "source")


Load = Callable[..., PreTrainedModel]


@pytest.fixture
def load(source: Path) -> Load:
    """`load("nf4")`: the base quantised while it is loaded, new each time."""

    def loaded(quantization: str, dtype: str = "float32") -> PreTrainedModel:
        return load_model(str(source), dtype=dtype, device="cpu", quantization=quantization).model

    return loaded


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def attached(
    base: nn.Module, tokenizer: PreTrainedTokenizerBase, trains: str = "b", **more: Any
) -> PeftModel:
    method = (
        {"name": "sc-lora", "trains": trains}
        if trains == "a"
        else {
            "name": "lora-null",
            "trains": trains,
        }
    )
    return forgetless.attach(
        base, tokenizer, method=method, rank=4, preserve_data=TEXTS, train_data=TRAIN, **more
    )


def train_by_hand(model: PeftModel, steps: int = 2) -> set[str]:
    """Layers with a nonzero gradient in the first step."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    touched: set[str] = set()
    for step in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        if step == 0:
            touched = {
                name
                for name, layer in adapted_layers(model).items()
                if any(p.grad is not None and p.grad.any() for p in layer.parameters())
            }
        optimizer.step()
        optimizer.zero_grad()
    return touched


@pytest.mark.parametrize("quantization", cells())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_weights_are_those_that_the_layer_computes_with(
    quantization: str, dtype: str, source: Path, load: Load
) -> None:
    full = load_model(str(source), dtype=dtype, device="cpu").model.state_dict()
    base = load(quantization, dtype)
    before = logits(base)  # moves an int8 layer's scales, and would repack a 4-bit layer
    for name, target in find_targets(base).targets.items():
        found = target.weight_OD()
        expected = independent_weight(quantization, full[f"{name}.weight"]).float()
        if quantization == "torchao-int8" and dtype == "bfloat16":  # rounds on the way to codes
            held = target.module.weight
            expected = (held.qdata.double() * held.scale.double()).float()
        # Between two codes the library's own rounding decides; nearly all others are the same.
        # Codes are 1/127 of a row's largest weight apart; bfloat16 rounds by 1/256 of each.
        rounding = expected.abs().amax(1, keepdim=True) * 1e-3
        if dtype == "bfloat16":
            rounding = rounding + expected.abs() / 256
        agree = ((found - expected).abs() <= rounding).double().mean()
        assert agree > 0.98, name
        low, high = ERROR[quantization]
        assert low < float((found - full[f"{name}.weight"]).norm() / found.norm()) < high
        assert target.bias_O() is None or torch.equal(target.bias_O(), full[f"{name}.bias"].float())
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("quantization", cells(form="{trains}"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trains", ["a", "b", "both"])
def test_an_adapter_starts_bit_for_bit_at_the_quantised_model(
    quantization: str,
    dtype: str,
    trains: str,
    load: Load,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    if trains == "both" and quantization not in CALLING:
        pytest.skip("refused there, as the test of refusals shows")
    expected = logits(load(quantization, dtype))
    base = load(quantization, dtype)
    identity = model_fingerprint(base)
    model = attached(base, tiny_tokenizer, trains)
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert train_by_hand(model) == set(find_targets(model).targets)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert model_fingerprint(model) == identity


@pytest.mark.parametrize("quantization", cells(trainer="hand-written loop", export="peft"))
def test_an_export_opens_with_peft_alone_on_the_quantised_and_on_the_full_base(
    quantization: str,
    source: Path,
    load: Load,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    model = attached(load(quantization), tiny_tokenizer)
    train_by_hand(model)
    live = logits(model)
    folder = forgetless.export(model, tmp_path / "out")
    trip = check_round_trip(model, folder, IDS)
    assert trip.max_update_error < 1e-6
    assert trip.max_difference == 0
    again = PeftModel.from_pretrained(load(quantization), folder)
    assert torch.equal(logits(again), live)
    full = load_model(str(source), dtype="float32", device="cpu").model
    with pytest.warns(ForgetlessWarning, match=f"quantisation {NAMES[quantization]}, and is"):
        on_full = load_adapter(full, folder)
    for name, layer in adapted_layers(on_full).items():
        for found, expected in zip(
            factors(layer), factors(adapted_layers(model)[name]), strict=True
        ):
            assert torch.equal(found, expected)
    # What the refusal to merge into a quantised base names as the remedy.
    merged = forgetless.export(
        on_full, tmp_path / "merged", target="merged", tokenizer=tiny_tokenizer
    )
    reloaded = load_model(str(merged), dtype="float32", device="cpu").model
    torch.testing.assert_close(logits(reloaded), logits(on_full), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "quantization", cells(CALLING, form="both", trainer="hand-written loop", export="vllm")
)
def test_both_trains_in_every_layer_and_exports_at_twice_the_rank(
    quantization: str, load: Load, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = attached(load(quantization), tiny_tokenizer, "both")
    assert form_of(model).name == "both"
    assert train_by_hand(model) == set(adapted_layers(model))
    folder = forgetless.export(model, tmp_path / "out", target="vllm")
    again = PeftModel.from_pretrained(load(quantization), folder)
    assert again.peft_config["default"].r == 8
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    for name, layer in adapted_layers(again).items():
        a_RD, b_OR = factors(adapted_layers(model)[name])
        found_RD, found_OR = factors(layer)
        torch.testing.assert_close(found_OR @ found_RD, b_OR @ a_RD)


@needed("torchao-int8")
def test_both_is_refused_before_calibration_where_a_merge_would_lose_it(
    load: Load, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("torchao-int8")
    modules = [type(m) for m in base.modules()]
    monkeypatch.setattr("forgetless.adapters.attach.load_rows", None)
    with pytest.raises(AdapterError, match=r"TorchaoLoraLinear.*trains: a or trains: b"):
        attached(base, tiny_tokenizer, "both")
    assert [type(m) for m in base.modules()] == modules
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("quantization", cells(trainer="transformers Trainer"))
def test_a_plain_trainer_trains_with_evaluations_in_between(
    quantization: str, load: Load, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.repeat(4, 1)]
    data = Dataset.from_list(rows)
    model = attached(load(quantization), tiny_tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            eval_steps=1,
            eval_strategy="steps",
            learning_rate=5e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    moved = [layer.lora_B["default"].weight.any() for layer in adapted_layers(model).values()]
    assert all(moved)


@pytest.mark.parametrize("quantization", cells(trainer="TRL SFTTrainer"))
@pytest.mark.parametrize("started", ["attach", "initialize"])
def test_sft_trainer_casts_one_side_and_the_adapter_still_computes(
    quantization: str,
    started: str,
    load: Load,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    from trl import SFTConfig, SFTTrainer

    base = load(quantization, "bfloat16")
    model = attached(base, tiny_tokenizer) if started == "attach" else base
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=5e-3,
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in TRAIN]),
        processing_class=tiny_tokenizer,
        peft_config=None if started == "attach" else LoraConfig(r=4, target_modules="all-linear"),
    )
    if started == "initialize":
        model = forgetless.initialize(
            trainer, method={"name": "lora-null", "trains": "b"}, preserve_data=TEXTS
        )
    trainer.train()
    layers = adapted_layers(model)
    assert all(layer.lora_B["default"].weight.any() for layer in layers.values())
    assert all(not layer.lora_A["default"].weight.requires_grad for layer in layers.values())
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("quantization", cells())
def test_evaluation_measures_against_the_quantised_base(
    quantization: str, load: Load, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = attached(load(quantization), tiny_tokenizer)
    at_start = forgetless.evaluate(model, tiny_tokenizer, retention=[TEXTS[:4]])
    assert at_start.items[0].metrics["kl"].tuned.mean == 0
    assert train_by_hand(model) == set(adapted_layers(model))  # also after an evaluation
    report = forgetless.evaluate(model, tiny_tokenizer, retention=[TEXTS[:4]])
    assert report.items[0].metrics["kl"].tuned.mean > 0
    assert report.movement is not None
    sizes = measure_weights(model)
    for name, target in find_targets(load(quantization)).targets.items():
        a_RD, b_OR = factors(adapted_layers(model)[name])
        weight_OD = target.weight_OD()
        expected = float((b_OR @ a_RD).norm() / weight_OD.norm())
        assert report.movement.layers[name].relative_norm == pytest.approx(expected, rel=1e-4)
        assert sizes[name].weight_norm == pytest.approx(float(weight_OD.norm()), rel=1e-5)


@pytest.mark.parametrize("quantization", cells())
def test_moments_of_the_cache_belong_to_one_quantisation(
    quantization: str, load: Load, source: Path
) -> None:
    found = {model_fingerprint(load(name)) for name in ("none", quantization)}
    assert len(found) == 2
    base = load(quantization)
    before = model_fingerprint(base)
    logits(base)
    assert model_fingerprint(base) == before
    assert unquantized_fingerprint(base) == unquantized_fingerprint(load("none", "bfloat16"))
    layer = base.model.layers[0].mlp.up_proj
    scales = [t for k, t in layer.state_dict().items() if k.endswith(("absmax", "SCB"))]
    scale = scales[0] if scales else layer.weight.scale
    scale.mul_(2)
    assert model_fingerprint(base) != before


@pytest.mark.parametrize("quantization", cells())
def test_an_export_of_a_quantised_base_is_refused_on_another_model(
    quantization: str,
    load: Load,
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    folder = forgetless.export(attached(load(quantization), tiny_tokenizer), tmp_path / "out")
    other = make_tiny_model(1, hidden_size=128, intermediate_size=192, attention_bias=True)
    with pytest.raises(AdapterError, match="expected its own base"):
        load_adapter(other, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgetlessWarning)
        load_adapter(load(quantization, "bfloat16"), folder)


@pytest.mark.parametrize("target", ["sglang", "tgi", "llama.cpp"])
@pytest.mark.parametrize("quantization", cells(trainer="hand-written loop", export="{target}"))
def test_what_was_trained_on_a_quantised_base_is_written_for_an_engine(
    quantization: str,
    target: str,
    load: Load,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    if target == "llama.cpp":
        pytest.importorskip("gguf", reason="pip install 'forgetless[llama-cpp]'")
    base = load(quantization)
    base.config.name_or_path = "somebody/llama"
    model = attached(base, tiny_tokenizer)
    train_by_hand(model)
    forgetless.export(model, tmp_path, target=target)
    assert lint_adapter(tmp_path, target, model) == []
    check = EXPORT_TARGETS[target].compare(ExportJob(model=model, folder=tmp_path), IDS)
    assert check.max_update_error < 1e-6
    assert check.max_difference < 1e-4


@pytest.mark.parametrize(
    "quantization",
    cells(export="merged", refused="export the adapter, and merge on the full-precision base"),
)
def test_a_merge_into_a_quantised_base_is_refused_with_the_remedy(
    quantization: str, load: Load, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = attached(load(quantization), tiny_tokenizer)
    with pytest.raises(AdapterError, match=rf"{NAMES[quantization]}.*full-precision base"):
        forgetless.export(model, tmp_path / "out", target="merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantization", cells())
def test_a_checkpoint_that_is_quantised_already_loads_as_it_is(
    quantization: str, load: Load, save_model: Callable[..., Path]
) -> None:
    base = load(quantization)
    expected = logits(base)
    folder = save_model(base, "saved")
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert loaded.quantization == NAMES[quantization]
    assert torch.equal(logits(loaded.model), expected)
    with pytest.raises(ModelError, match=f"quantised already .{NAMES[quantization]}"):
        load_model(str(folder), device="cpu", quantization=quantization)


@needed("nf4")
def test_a_4_bit_base_that_was_repacked_before_is_laid_out_again(
    load: Load, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    import bitsandbytes

    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    exact = load("nf4")
    weights = {n: t.weight_OD() for n, t in find_targets(exact).targets.items()}
    base = load("nf4")
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    logits(base)
    assert vars(base.model.layers[0].mlp.up_proj.weight.quant_state)["packing_format_for_cpu"]
    model = attached(base, tiny_tokenizer)
    for name, target in find_targets(model).targets.items():
        # bitsandbytes has rounded the scales to bfloat16: 2^-9 of each.
        torch.testing.assert_close(target.weight_OD(), weights[name], rtol=2**-8, atol=0)
    assert train_by_hand(model) == set(adapted_layers(model))


def test_a_recipe_takes_every_quantisation_that_there_is() -> None:
    names = Recipe.model_fields["quantization"].annotation
    assert set(get_args(names)) == {"none", *QUANTIZERS}


def test_a_quantisation_that_is_not_there_is_named(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="expected none, nf4, int8, torchao-int8, got 'nf5'"):
        load_model(str(source), device="cpu", quantization="nf5")
    monkeypatch.setattr("forgetless.models.quantization.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"needs the package bitsandbytes.*forgetless\[quantized"):
        load_model(str(source), device="cpu", quantization="nf4")


@needed("torchao-int8")
def test_a_quantisation_that_takes_no_layer_is_an_error_with_another_one(
    tiny_gpt2: PreTrainedModel, save_model: Callable[..., Path]
) -> None:
    """torchao passes over GPT-2's Conv1D; nothing in the model would be quantised."""
    folder = str(save_model(tiny_gpt2, "gpt2"))
    with pytest.raises(ModelError, match=r"got none of 8 \(Conv1D\).*another one \(nf4, int8\)"):
        load_model(folder, device="cpu", quantization="torchao-int8")


@pytest.mark.parametrize("quantization", [pytest.param(n, marks=needed(n)) for n in QUANTIZERS])
def test_experts_that_stay_in_full_precision_are_named(
    quantization: str, save_model: Callable[..., Path]
) -> None:
    folder = str(save_model(tiny_base("mixtral"), "mixtral"))
    # Two layers of four experts: gate and up (128, 32), down (32, 64).
    numbers = 2 * 4 * (128 * 32 + 32 * 64)
    said = rf"{NAMES[quantization]}: 8 of 8 .* \({numbers} numbers\): model.layers.0.mlp.experts"
    with pytest.warns(ForgetlessWarning, match=said):
        load_model(folder, dtype="float32", device="cpu", quantization=quantization)


@needed("int8")
def test_layers_that_a_checkpoint_leaves_out_are_counted_and_named(
    source: Path, save_model: Callable[..., Path]
) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "q_proj"])
    part = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    folder = str(save_model(part, "part"))
    said = r"12 of 14 .*left as they are: model.layers.0.self_attn.q_proj, model.layers.1"
    with pytest.warns(ForgetlessWarning, match=said):
        load_model(folder, dtype="float32", device="cpu")


@needed("nf4")
@pytest.mark.parametrize("width", [96, 128])
def test_a_4_bit_layer_that_bitsandbytes_misreads_on_a_cpu_is_warned_of(
    width: int, make_tiny_model: Callable[..., PreTrainedModel], save_model: Callable[..., Path]
) -> None:
    """Rows of 96 are a block and a half; the independent weight is 9 % off the full one."""
    folder = str(save_model(make_tiny_model(hidden_size=width, intermediate_size=128)))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        base = load_model(folder, dtype="float32", device="cpu", quantization="nf4").model
    full = load_model(folder, dtype="float32", device="cpu").model.state_dict()
    wrong = set()
    for name, target in find_targets(base).targets.items():
        expected = independent_weight("nf4", full[f"{name}.weight"]).float()
        error = float((target.weight_OD() - expected).norm() / expected.norm())
        wrong |= {name} if error > 0.1 else set()
    said = [str(one.message) for one in heard if "wrongly on a CPU" in str(one.message)]
    assert len(said) == bool(wrong)
    assert all(f"reads {len(wrong)} 4-bit layers" in text for text in said)
    assert bool(wrong) == (width == 96)


@needed("nf4")
def test_a_quantised_checkpoint_without_its_package_names_the_extra(
    load: Load, save_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(save_model(load("nf4"), "saved"))
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False
    )
    with pytest.raises(ModelError, match=r"a package that is missing.*forgetless\[quantized\]"):
        load_model(folder, device="cpu")


@needed("nf4")
def test_another_release_of_bitsandbytes_is_told_of_and_given_no_attribute(load: Load) -> None:
    base = load("nf4")
    layer = base.model.layers[0].mlp.up_proj
    del layer.support_avx512bf16_for_cpu
    before = set(vars(layer))
    with pytest.warns(ForgetlessWarning, match="1 4-bit layers have no switch"):
        keep_trainable_layout(base)
    assert set(vars(layer)) == before


@needed("nf4")
def test_a_repacked_weight_without_a_way_back_is_an_error(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    base = load("nf4")
    base.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    monkeypatch.delattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu_inverse")
    with pytest.raises(ModelError, match=r"lay out repacked 4-bit weights.*forgetless\[quantized"):
        keep_trainable_layout(base)


@pytest.fixture
def gptq(make_tiny_model: Callable[..., PreTrainedModel]) -> Callable[[], tuple[Any, Any]]:
    """A base of GPTQ's layers and its dense weights, new each time."""
    for package in ("gptqmodel", "optimum"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which is not in forgetless[quantized]")

    def make() -> tuple[Any, Any]:
        return gptq_base(make_tiny_model(hidden_size=64, intermediate_size=128))

    return make


@pytest.mark.compatibility(
    base="Llama",
    form="{trains}",
    quantization="GPTQ 4-bit",
    trainer="hand-written loop",
    export="peft",
)
@pytest.mark.parametrize("trains", ["a", "b", "both"])
def test_gptqs_layers_hold_adapters_in_every_form(
    trains: str,
    gptq: Callable[[], tuple[Any, Any]],
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    base, weights = gptq()
    expected = logits(base)
    for name, target in find_targets(base).targets.items():
        # Scales are float16, and so is a product with one of them.
        torch.testing.assert_close(target.weight_OD(), weights[name], rtol=2**-9, atol=1e-4)
    model = attached(base, tiny_tokenizer, trains)
    assert set(adapted_layers(model)) == set(weights)
    assert torch.equal(logits(model), expected)
    assert train_by_hand(model) == set(weights)
    folder = forgetless.export(model, tmp_path / "out")
    again = PeftModel.from_pretrained(gptq()[0], folder)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    assert not torch.equal(logits(again), expected)
    with pytest.raises(AdapterError, match="full-precision base"):
        forgetless.export(model, tmp_path / "merged", target="merged")


@pytest.mark.compatibility(
    base="Llama",
    form="{trains}",
    quantization="HQQ 4-bit",
    trainer="hand-written loop",
    export="peft",
)
@pytest.mark.parametrize("trains", ["a", "b", "both"])
def test_hqqs_layers_hold_adapters_in_every_form(
    trains: str,
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    quantize = pytest.importorskip(
        "hqq.core.quantize", reason="needs hqq, which is not in forgetless[quantized]"
    )

    def make() -> PreTrainedModel:
        model = make_tiny_model(hidden_size=64, intermediate_size=128)
        config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
        for block in model.model.layers:
            for part in (block.self_attn, block.mlp):
                for name, dense in list(part.named_children()):
                    if isinstance(dense, nn.Linear):
                        layer = quantize.HQQLinear(
                            dense, config, compute_dtype=torch.float32, device="cpu"
                        )
                        setattr(part, name, layer)
        return model

    base = make()
    expected, identity = logits(base), model_fingerprint(base)
    for target in find_targets(base).targets.values():
        x_TD = torch.randn(3, target.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(target.module(x_TD), x_TD @ target.weight_OD().T)
    model = attached(base, tiny_tokenizer, trains)
    assert torch.equal(logits(model), expected)
    assert train_by_hand(model) == set(adapted_layers(model))
    assert model_fingerprint(model) == identity
    folder = forgetless.export(model, tmp_path / "out")
    again = PeftModel.from_pretrained(make(), folder)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    with pytest.raises(AdapterError, match="full-precision base"):
        forgetless.export(model, tmp_path / "merged", target="merged")
