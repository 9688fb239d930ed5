"""Cutting the rank: least loss where the data are, figures that hold, a model left as found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import forgetless
from forgetless.adapters.compress import COMPRESSED, IDENTITY, compressed, metric_on
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.merge import save_merged
from forgetless.data.loading import load_rows
from forgetless.data.spec import parse_data
from forgetless.errors import AdapterError, ForgetlessWarning
from forgetless.evaluation.movement import measure_movement

IDS = torch.arange(5, 29).reshape(2, 12)
TEXTS = [
    f"The capital of country {n} is city {n * 7 % 13}, and {n} apples are there." for n in range(24)
]
few_tokens = pytest.mark.filterwarnings("ignore:calibration. .* compression tokens")
blind = pytest.mark.filterwarnings("ignore:export. rank .* identity metric")


def lora(base: nn.Module, **options: Any) -> PeftModel:
    made = {"r": 12, "lora_alpha": 24, "target_modules": ["q_proj", "down_proj"], **options}
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **made)).eval()  # type: ignore[arg-type]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def deltas(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    found = {}
    for name, layer in adapted_layers(model, adapter).items():
        a_RD, b_OR = factors(layer, adapter)
        found[name] = b_OR @ a_RD
    return found


def inputs_of(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """All tokens that reach each adapted layer of the base, text by text."""
    seen: dict[str, list[Tensor]] = {name: [] for name in adapted_layers(model)}
    hooks = [
        layer.get_base_layer().register_forward_hook(
            lambda _m, args, _o, name=name: seen[name].append(args[0][0].double())
        )
        for name, layer in adapted_layers(model).items()
    ]
    with model.disable_adapter(), torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@few_tokens
def test_the_loss_is_the_least_on_the_tokens_of_the_data_and_reported_as_it_is(
    tiny_model: nn.Module, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = lora(tiny_model)
    before, inputs = deltas(model), inputs_of(model, tiny_tokenizer)
    metric = metric_on(model, tiny_tokenizer, TEXTS)
    total_lost = total = 0.0
    with compressed(model, 3, metric, scale=0.5) as found:
        after = deltas(model, COMPRESSED)
        for name, x_TD in inputs.items():
            wanted_TO = x_TD @ (0.5 * before[name]).double().T
            lost = float((wanted_TO - x_TD @ after[name].double().T).square().sum())
            whole = float(wanted_TO.square().sum())
            least = float(torch.linalg.svdvals(wanted_TO)[3:].square().sum())
            assert lost == pytest.approx(least, rel=1e-3)
            assert found.layers[name].error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
            total_lost, total = total_lost + lost, total + whole
    assert found.error == pytest.approx((total_lost / total) ** 0.5, rel=1e-3)
    assert found.worst_error == max(layer.error for layer in found.layers.values())
    assert found.layers[found.worst_layer].error == found.worst_error
    assert (found.rank_before, found.rank) == (12, 3)
    assert f"examples: {inputs[found.worst_layer].shape[0]} tokens" in found.metric


@few_tokens
def test_the_drift_is_what_an_evaluation_measures_on_the_same_data(
    tiny_model: nn.Module, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = lora(tiny_model)
    metric = metric_on(model, tiny_tokenizer, TEXTS)
    rows = [load_rows(spec, tiny_tokenizer) for spec in parse_data(TEXTS)]
    with compressed(model, 3, metric) as found:
        cut = measure_movement(model, tiny_tokenizer, rows, adapter=COMPRESSED)
    whole = measure_movement(model, tiny_tokenizer, rows, adapter="default")
    assert found.drift == pytest.approx(cut.drift, rel=1e-4)
    assert found.drift_before == pytest.approx(whole.drift, rel=1e-4)
    assert found.drift < found.drift_before


@pytest.mark.parametrize("form", ["both", "b"])
@few_tokens
def test_a_method_s_adapter_is_cut_to_its_own_rank(
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    form: str,
) -> None:
    method = {"name": "lora-null", "rank": 4, "trains": form}
    model = forgetless.attach(
        make_tiny_model(), tiny_tokenizer, method=method, preserve_data=TEXTS, min_tokens=1
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                )
    expected = {name: torch.linalg.matrix_rank(delta) for name, delta in deltas(model).items()}
    forgetless.export(
        model, tmp_path, target="peft", max_rank=4, moments_data=TEXTS, tokenizer=tiny_tokenizer
    )
    figures = tmp_path / "compression.json"
    assert figures.is_file() == (form == "both")
    assert max(expected.values()) == (8 if form == "both" else 4)
    alone = PeftModel.from_pretrained(make_tiny_model(), str(tmp_path))
    assert alone.peft_config["default"].r == 4
    if form == "b":
        torch.testing.assert_close(logits(alone), logits(model), rtol=1e-4, atol=1e-4)
    else:
        found = json.loads(figures.read_text())
        assert 0 < found["error"] < 1
        assert (found["rank_before"], found["rank"]) == (8, 4)


@blind
def test_a_rank_that_the_update_does_not_need_is_cut_without_loss(
    make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = lora(make_tiny_model(), r=40, target_modules=["q_proj"])  # 32 wide
    for target in ("peft", "vllm", "tgi"):
        forgetless.export(model, tmp_path / target, target=target, max_rank=32)
        alone = PeftModel.from_pretrained(make_tiny_model(), str(tmp_path / target))
        torch.testing.assert_close(logits(alone), logits(model), rtol=1e-3, atol=1e-3)
        assert json.loads((tmp_path / target / "compression.json").read_text())["error"] < 1e-5


@blind
def test_a_merged_model_holds_the_cut_update(
    make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = lora(make_tiny_model())
    before = deltas(model)
    forgetless.export(model, tmp_path, target="merged", scale=0.5, max_rank=2)
    merged = type(make_tiny_model()).from_pretrained(tmp_path)
    for name, delta in before.items():
        u, sigma, v = torch.linalg.svd(0.5 * delta)
        gap = merged.get_submodule(name).weight - make_tiny_model().get_submodule(name).weight
        torch.testing.assert_close(gap.detach(), u[:, :2] * sigma[:2] @ v[:2], rtol=1e-3, atol=1e-4)


@blind
def test_the_model_is_left_as_it_was_found(tiny_model: nn.Module, tmp_path: Path) -> None:
    model = lora(tiny_model)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    forgetless.export(model, tmp_path, max_rank=2)
    assert list(model.peft_config) == ["default"]
    assert list(model.active_adapters) == ["default"]
    assert [module.training for module in model.modules()] == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_identity_metric_is_said_aloud(tiny_model: nn.Module, tmp_path: Path) -> None:
    model = lora(tiny_model)
    with pytest.warns(ForgetlessWarning, match="rank 12 is cut to 2 in the identity metric"):
        forgetless.export(model, tmp_path, max_rank=2)
    found = json.loads((tmp_path / "compression.json").read_text())
    assert found["metric"] == IDENTITY.label
    share = [
        float(torch.linalg.svdvals(delta)[2:].square().sum()) for delta in deltas(model).values()
    ]
    whole = [float(delta.square().sum()) for delta in deltas(model).values()]
    assert found["error"] == pytest.approx((sum(share) / sum(whole)) ** 0.5, rel=1e-4)
    forgetless.export(model, tmp_path)
    assert not (tmp_path / "compression.json").exists()  # of another export


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": 0}, "expected a whole number, 1 or more, got 0"),
        ({"max_rank": True}, "got True"),
        ({"moments_data": ["a text"]}, "expected a max rank to cut to, got none"),
        ({"moments_data": ["a text"], "max_rank": 2}, "pass tokenizer="),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    tiny_model: nn.Module, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        forgetless.export(lora(tiny_model), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_merge_keeps_the_dtypes_of_the_base(tiny_model: nn.Module, tmp_path: Path) -> None:
    tiny_model.get_submodule("model.norm").to(torch.float64)
    model = lora(tiny_model)
    forgetless.export(model, tmp_path / "one", target="merged")
    save_merged(model, tmp_path / "two")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two")]
    assert weights[0] == weights[1]
