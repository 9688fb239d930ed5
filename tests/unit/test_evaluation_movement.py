"""Update size, drift, leakage and norm against dense ΔW and explicit moments in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.forms import FORMS, adapted_layers
from forgetless.calibration.engine import collect_moments
from forgetless.data.rows import Row, RowSet
from forgetless.data.spec import DataSpec
from forgetless.data.tokens import make_batches, pad_token_id, tokenize
from forgetless.errors import AdapterError, CalibrationError, ForgetlessWarning
from forgetless.evaluation.movement import measure_movement
from forgetless.linalg.moments import drift_bound, moment_drift
from forgetless.methods.base import AdapterInit
from forgetless.models.targets import find_targets
from training_setup import adapted

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Paris",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10, and many apples more than there are in Paris.",
    "Iron is a chemical element.",
)


def row_set(tokens: str = "all") -> RowSet:
    rows = [Row("", text) for text in TEXTS] + [Row("Question: how many?", " there are 12 apples")]
    return RowSet(DataSpec(examples=list(TEXTS), tokens=tokens), tuple(rows))


def randomise(model: PeftModel, seed: int = 3) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * 0.2)
    return model.eval()


def third_party(model: torch.nn.Module) -> PeftModel:
    """As somebody else might train it: patterns, rslora, alpha ≠ rank, not every layer."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 7},
        alpha_pattern={"v_proj": 3},
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=0.1,
    )
    return randomise(get_peft_model(model, config))


def dense_delta(layer: LoraLayer, adapter: str = "default") -> torch.Tensor:
    """PEFT's own ΔW, (O, D)."""
    delta = layer.get_delta_weight(adapter).detach().double()
    return delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta


@torch.no_grad()
def inputs_of_layers(model: PeftModel, tokenizer, rows: RowSet, tokens: str) -> dict:
    """Inputs of every adapted layer in the base, (T, D), row by row without padding."""
    seen: dict[str, list[torch.Tensor]] = {}
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    current: dict[str, int] = {}

    def hook_for(name):
        def hook(_module, args):
            seen.setdefault(name, []).append(args[0][0, current["skip"] :].double())

        return hook

    handles = [m.register_forward_pre_hook(hook_for(n)) for n, m in layers.items()]
    with model.disable_adapter():
        for row in tokenize(rows, tokenizer):
            current["skip"] = row.prompt_length if tokens == "completion" else 0
            model(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    return {name: (layers[name], torch.cat(parts)) for name, parts in seen.items()}


def naive_layer(layer: LoraLayer, x: torch.Tensor) -> dict[str, float]:
    delta = dense_delta(layer)
    base = layer.get_base_layer()
    weight = base.weight.detach().double()
    weight = weight.T if isinstance(base, Conv1D) else weight
    moment = sum(torch.outer(t, t) for t in x) / len(x)
    a = layer.lora_A["default"].weight.detach().double()
    projector = torch.linalg.pinv(a) @ a
    rank = torch.linalg.matrix_rank(a)
    return {
        "update_size": float(np.mean([float((delta @ t).norm() / t.norm()) for t in x])),
        "drift": float(
            torch.trace(delta @ moment @ delta.T) / torch.trace(weight @ moment @ weight.T)
        ),
        "leakage": float(a.shape[1] / rank * torch.trace(projector @ moment) / moment.trace()),
        "relative_norm": float(delta.norm() / weight.norm()),
    }


@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_third_party_lora_is_measured_as_its_dense_update(tiny_model, tiny_tokenizer, tokens):
    model = third_party(tiny_model.double())
    rows = row_set(tokens)

    movement = measure_movement(model, tiny_tokenizer, [rows], adapter="default")

    inputs = inputs_of_layers(model, tiny_tokenizer, rows, tokens)
    assert movement.layers.keys() == inputs.keys()
    for name, (layer, x) in inputs.items():
        for key, value in naive_layer(layer, x).items():
            assert movement.layers[name].model_dump()[key] == pytest.approx(value, rel=1e-6), key
    for key in ("update_size", "drift", "leakage", "relative_norm"):
        each = [figures.model_dump()[key] for figures in movement.layers.values()]
        assert movement.model_dump()[key] == pytest.approx(np.mean(each))


def test_conv1d_layers_with_biases_are_measured(tiny_gpt2, tiny_tokenizer):
    config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = randomise(get_peft_model(tiny_gpt2.double(), config))
    rows = row_set()

    movement = measure_movement(model, tiny_tokenizer, [rows], adapter="default")

    for name, (layer, x) in inputs_of_layers(model, tiny_tokenizer, rows, "all").items():
        for key, value in naive_layer(layer, x).items():
            assert movement.layers[name].model_dump()[key] == pytest.approx(value, rel=1e-6), key


def test_drift_on_a_moment_of_the_same_rows_equals_the_held_out_drift(tiny_model, tiny_tokenizer):
    model = third_party(tiny_model.double())
    rows = row_set()
    batches = make_batches(
        tokenize(rows, tiny_tokenizer), batch_size=2, pad_token_id=pad_token_id(tiny_tokenizer)
    )
    moments = collect_moments(model, find_targets(model).targets, batches)

    movement = measure_movement(
        model, tiny_tokenizer, [rows], adapter="default", calibration_moments=moments
    )

    for figures in movement.layers.values():
        assert figures.drift_calibration == pytest.approx(figures.drift, rel=1e-6)
    assert movement.drift_calibration == pytest.approx(movement.drift, rel=1e-6)


def test_untouched_adapter_has_not_moved(tiny_model, tiny_tokenizer):
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))

    movement = measure_movement(model, tiny_tokenizer, [row_set()], adapter="default")

    assert movement.update_size == movement.drift == movement.relative_norm == 0
    assert 0.1 < movement.leakage < 10


def test_adapter_whose_a_is_zero_leaks_nothing(tiny_model, tiny_tokenizer):
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()

    movement = measure_movement(model, tiny_tokenizer, [row_set()], adapter="default")

    assert movement.leakage == movement.update_size == 0


def test_movement_grows_with_the_scale_of_the_layers(tiny_model, tiny_tokenizer):
    model = third_party(tiny_model)
    whole = measure_movement(model, tiny_tokenizer, [row_set()], adapter="default")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 0.5

    half = measure_movement(model, tiny_tokenizer, [row_set()], adapter="default")

    assert half.update_size == pytest.approx(whole.update_size / 2, rel=1e-5)
    assert half.drift == pytest.approx(whole.drift / 4, rel=1e-5)
    assert half.leakage == pytest.approx(whole.leakage, rel=1e-5)


def test_movement_ignores_how_rows_are_split_over_sets(tiny_model, tiny_tokenizer):
    model = third_party(tiny_model)
    rows = row_set()
    parts = [RowSet(rows.spec, rows.rows[:1]), RowSet(rows.spec, rows.rows[1:])]

    whole = measure_movement(model, tiny_tokenizer, [rows], adapter="default")
    split = measure_movement(model, tiny_tokenizer, parts, adapter="default")

    assert split.update_size == pytest.approx(whole.update_size, rel=1e-5)
    assert split.drift == pytest.approx(whole.drift, rel=1e-5)


def test_adapted_head_is_named_as_not_measured(make_tiny_model, tiny_tokenizer):
    model = make_tiny_model(tie_word_embeddings=False)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))

    with pytest.warns(ForgetlessWarning, match="lm_head is adapted but"):
        movement = measure_movement(tuned, tiny_tokenizer, [row_set()], adapter="default")

    assert len(movement.layers) == 2


def test_nan_in_an_adapter_is_refused_with_the_layer(tiny_model, tiny_tokenizer):
    model = third_party(tiny_model)
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")

    with pytest.raises((CalibrationError, AdapterError), match=r"layers\.1\.self_attn\.v_proj"):
        measure_movement(model, tiny_tokenizer, [row_set()], adapter="default")


def test_hooks_are_gone_afterwards(tiny_model, tiny_tokenizer):
    model = third_party(tiny_model)
    measure_movement(model, tiny_tokenizer, [row_set()], adapter="default")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("form", ["plain", "a", "b", "both"])
def test_update_size_of_every_form_is_what_its_layers_add_to_the_base(
    tiny_model, tiny_tokenizer, form
):
    model = get_peft_model(
        tiny_model.double(), LoraConfig(r=3, lora_alpha=7, target_modules=["k_proj", "gate_proj"])
    )
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model).values():
        a0 = torch.randn(3, layer.in_features, generator=generator, dtype=torch.float64)
        b0 = torch.randn(layer.out_features, 3, generator=generator, dtype=torch.float64)
        FORMS[form].start(layer, "default", AdapterInit(a0, b0))
        with torch.no_grad():
            for part in (layer.lora_A, layer.lora_B):
                weight = part["default"].weight
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.add_(0.1 * noise)
    rows = row_set()

    movement = measure_movement(model.eval(), tiny_tokenizer, [rows], adapter="default")

    for name, (layer, x) in inputs_of_layers(model, tiny_tokenizer, rows, "all").items():
        with torch.no_grad():
            moved = layer(x) - layer.get_base_layer()(x)
        expected = float((moved.norm(dim=1) / x.norm(dim=1)).mean())
        assert movement.layers[name].update_size == pytest.approx(expected, rel=1e-6)


def test_leakage_of_both_is_that_of_the_papers_a_however_small_the_deviation(
    tiny_model, tiny_tokenizer
):
    """Frozen W - B0 A0 with a trained A: what counts is A itself, not the stacked export."""
    generator = torch.Generator().manual_seed(0)
    model = get_peft_model(tiny_model, LoraConfig(r=3, target_modules=["q_proj"]))
    starts = {}
    for name, layer in adapted_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        init = AdapterInit(
            torch.randn(a.shape, generator=generator), torch.randn(b.shape, generator=generator)
        )
        FORMS["both"].start(layer, "default", init)
        with torch.no_grad():
            a.copy_(1e-6 * torch.randn(a.shape, generator=generator))
        starts[name] = init.a_RD
    found = measure_movement(model, tiny_tokenizer, [row_set()], adapter="default")
    targets = find_targets(tiny_model).targets
    rows = tokenize(row_set(), tiny_tokenizer)
    batches = make_batches(rows, batch_size=2, pad_token_id=pad_token_id(tiny_tokenizer))
    moments = collect_moments(model, targets, batches)
    for name, a_RD in starts.items():
        moment = moments.of(name).mean_DD().double().numpy()
        basis = np.linalg.svd(a_RD.double().numpy(), full_matrices=False)[2]
        expected = np.trace(basis @ moment @ basis.T) / np.trace(moment) * moment.shape[0] / 3
        assert found.layers[name].leakage == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", ["plain", "a", "b", "both"])
def test_the_bound_holds_for_every_b_where_a_is_frozen_and_is_not_claimed_elsewhere(
    make_tiny_model, tiny_tokenizer, form
):
    """Calibration data that reach A well: the bound must hold by the theorem, not by smallness."""
    model = adapted(make_tiny_model(), form)
    rows = row_set()
    batches = make_batches(
        tokenize(rows, tiny_tokenizer), batch_size=4, pad_token_id=pad_token_id(tiny_tokenizer)
    )
    moments = collect_moments(model, find_targets(model).targets, batches)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        found = measure_movement(
            model, tiny_tokenizer, [rows], adapter="default", calibration_moments=moments
        )
        for name, layer in found.layers.items():
            if form != "b":
                assert layer.drift_bound is None
                continue
            m = moments.of(name).mean_DD().double().numpy()
            peft_layer = adapted_layers(model)[name]
            delta = dense_delta(peft_layer).numpy()
            a = peft_layer.lora_A["default"].weight.detach().double().numpy()
            u = np.linalg.svd(a, full_matrices=False)[2].T
            w = peft_layer.get_base_layer().weight.detach().double().numpy()
            largest = np.linalg.eigvalsh(u.T @ m @ u)[-1]
            expected = largest * (delta**2).sum() / np.trace(w @ m @ w.T)
            assert layer.drift_bound == pytest.approx(expected, rel=1e-3)
            assert layer.drift_calibration <= layer.drift_bound * (1 + 1e-5)
    if form == "b":
        assert found.drift_bound == pytest.approx(
            sum(layer.drift_bound for layer in found.layers.values()) / len(found.layers)
        )
        half = found.scaled(0.5)
        assert half.drift_bound == pytest.approx(found.drift_bound / 4)


def test_the_bound_is_reached_where_b_writes_the_loudest_direction_alone():
    moment, weight = torch.diag(torch.tensor([9.0, 4.0, 1.0])), torch.eye(3)
    basis = torch.eye(3)[:, :2]
    loudest = torch.tensor([[2.0, 0.0, 0.0]])
    assert drift_bound(loudest, weight, moment, basis) == pytest.approx(
        moment_drift(loudest, weight, moment)
    )
    assert drift_bound(loudest, weight, moment, basis[:, :0]) == 0.0
