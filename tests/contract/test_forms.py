"""Every form starts exactly, keeps base and frozen side, and equals the papers' residual form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from forgetless.adapters.forms import (
    FORMS,
    adapted_layers,
    align_adapter_dtype,
    factors,
    form_of,
)
from forgetless.adapters.load import load_adapter
from forgetless.adapters.scale import scaled_adapter
from forgetless.adapters.variant import LIVE_BOTH
from forgetless.errors import AdapterError
from forgetless.methods.base import AdapterInit

ALL = list(FORMS)
IDS = torch.arange(5, 29).reshape(2, 12)


def start(
    model: nn.Module, form: str, *, rank: int = 4, alpha: float = 6.0, adapter: str = "default"
) -> PeftModel:
    """PEFT's own route, then a form's start from random factors."""
    targets = ["c_attn", "c_fc"] if hasattr(model, "transformer") else ["q_proj", "down_proj"]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=hasattr(model, "transformer"),
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
        model.set_adapter(adapter)
        peft_model = model
    else:
        peft_model = get_peft_model(model, config, adapter_name=adapter)
    generator = torch.Generator().manual_seed(7)
    for layer in adapted_layers(peft_model, adapter).values():
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        init = AdapterInit(
            torch.randn(a.shape, generator=generator, dtype=torch.float64) / 6,
            torch.randn(b.shape, generator=generator, dtype=torch.float64) / 6,
        )
        FORMS[form].start(layer, adapter, init)
    return peft_model


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: nn.Module, steps: int, lr: float = 1e-2) -> None:
    model.eval()  # no dropout: the comparisons are exact
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def delta(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in adapted_layers(model, adapter).items():
        a, b = factors(layer, adapter)
        found[name] = b @ a
    return found


@pytest.fixture
def tiny_biased(make_tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return make_tiny_model(attention_bias=True, mlp_bias=True)


@pytest.fixture(params=["llama", "llama with biases", "gpt2"])
def base(request: pytest.FixtureRequest) -> nn.Module:
    """nn.Linear without and with biases, and Conv1D with biases."""
    model: nn.Module = request.getfixturevalue(
        {"llama": "tiny_model", "gpt2": "tiny_gpt2"}.get(request.param, "tiny_biased")
    )
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ALL)
def test_a_form_starts_bit_for_bit_at_the_base(
    base: nn.Module, form: str, dtype: torch.dtype
) -> None:
    base = base.to(dtype)
    expected = logits(base)
    model = start(base, form)
    assert torch.equal(logits(model), expected)
    for update in delta(model).values():
        assert not update.any()


@pytest.mark.parametrize("form", ALL)
def test_disabling_the_adapter_gives_the_base_before_during_and_after_training(
    base: nn.Module, form: str
) -> None:
    expected = logits(base)
    model = start(base, form)
    for _ in range(3):
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        train(model, 2)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("form", ALL)
def test_the_frozen_side_stays_frozen(base: nn.Module, form: str) -> None:
    model = start(base, form)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    kinds = {
        "plain": {"lora_A", "lora_B"},
        "a": {"lora_A"},
        "b": {"lora_B"},
        "both": {"lora_A", "lora_B"},
    }
    assert {next(k for k in n.split(".") if k.startswith("lora_")) for n in expected} == kinds[form]
    for _ in range(2):
        with model.disable_adapter():
            logits(model)
        model.set_adapter("default")
        train(model, 2)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another adapter"])
@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("form", ["a", "b", "both"])
def test_training_equals_the_residual_form_of_the_papers(
    base: nn.Module, form: str, steps: int, beside: bool
) -> None:
    """W_res = W - s B0 A0 and LoRA that starts at (A0, B0): written without the package's forms."""
    rank, alpha = 4, 6.0
    base = base.double()
    if beside:
        base = start(base, "both", adapter="other")
        train(base, 2)
    model = start(base, form, rank=rank, alpha=alpha)
    reference = _residual_model(model, form, alpha / rank)
    train(model, steps)
    train(reference, steps)
    for name, update in delta(model).items():
        layer = reference.get_submodule(name)
        expected = alpha / rank * (layer.B @ layer.A) - layer.start
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-13 if steps == 1 else 1e-10)
        assert update.norm() > 1e-3


class _Residual(nn.Module):
    """h = (W - s B0 A0) x + bias + s B A x, A and B from (A0, B0)."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a0: torch.Tensor,
        b0: torch.Tensor,
        scale: float,
        form: str,
    ) -> None:
        super().__init__()
        self.scale, self.bias = scale, bias
        self.start = scale * b0 @ a0
        self.residual = weight - self.start
        self.A = nn.Parameter(a0.clone(), requires_grad=form in ("a", "both"))
        self.B = nn.Parameter(b0.clone(), requires_grad=form in ("b", "both"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.residual.T + self.scale * (x @ self.A.T @ self.B.T)
        return h if self.bias is None else h + self.bias


def _residual_model(model: PeftModel, form: str, scale: float) -> nn.Module:
    """A deep copy of the base in which adapted layers are residual layers."""
    import copy

    reference = copy.deepcopy(model.get_base_model()).eval()
    generator = torch.Generator().manual_seed(7)
    for name, layer in adapted_layers(model).items():
        wrapped = reference.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a0 = torch.randn(a.shape, generator=generator, dtype=torch.float64) / 6
        b0 = torch.randn(b.shape, generator=generator, dtype=torch.float64) / 6
        if form == "b":
            # ΔW does not depend on B0 when A is frozen: any start gives the same trajectory.
            b0 = b0 * 0.5
        if form == "a":
            a0 = a0 * 0.5
        weight = wrapped.base_layer.weight.detach()
        weight = weight.T if wrapped.fan_in_fan_out else weight
        bias = wrapped.base_layer.bias
        parent = reference.get_submodule(name.rpartition(".")[0])
        setattr(
            parent,
            name.rpartition(".")[2],
            _Residual(weight, None if bias is None else bias.detach(), a0, b0, scale, form),
        )
    for name, parameter in reference.named_parameters():
        if not name.endswith((".A", ".B")):
            parameter.requires_grad_(False)
    return reference


@pytest.mark.parametrize("form", ALL)
def test_a_second_adapter_beside_it_works(base: nn.Module, form: str) -> None:
    expected = logits(base)
    model = start(base, "plain", adapter="other")
    train(model, 2)
    other = logits(model)
    model = start(model, form, adapter="second")
    assert torch.equal(logits(model), expected)
    train(model, 2)
    second = logits(model)
    model.set_adapter("other")
    assert torch.equal(logits(model), other)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    model.set_adapter("other")
    assert torch.equal(logits(model), other)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("form", ALL)
def test_merge_and_unmerge_keep_the_function(base: nn.Module, form: str, safe: bool) -> None:
    model = start(base.double(), form)
    train(model, 3)
    expected, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ALL)
def test_a_checkpoint_holds_all_that_its_form_needs(
    base: nn.Module, form: str, tmp_path: Path
) -> None:
    model = start(base, form)
    assert form_of(model).name == form
    train(model, 3)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    fresh = model.unload()
    reloaded = load_adapter(fresh, tmp_path)
    assert torch.equal(logits(reloaded), expected)
    assert not any(p.requires_grad for p in reloaded.parameters())
    with reloaded.disable_adapter():
        logits(reloaded)
    reloaded.set_adapter("default")
    assert not any(p.requires_grad for n, p in reloaded.named_parameters() if "fixed" in n)


def test_a_folder_of_the_form_both_without_its_fixed_tensors_is_damaged(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    model = start(tiny_model, "both")
    model.peft_config["default"].init_lora_weights = LIVE_BOTH
    train(model, 2)
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "fixed" not in n}, path)
    with pytest.raises(AdapterError, match="fixed"):
        load_adapter(model.unload(), tmp_path)


def test_peft_alone_refuses_a_live_folder_of_the_form_both(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    model = start(tiny_model, "both")
    model.peft_config["default"].init_lora_weights = LIVE_BOTH
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="forgetless export"):
        PeftModel.from_pretrained(model.unload(), str(tmp_path))


@pytest.mark.parametrize("form", ALL)
def test_scaling_the_update_is_exact_and_restored(base: nn.Module, form: str) -> None:
    model = start(base, form)
    train(model, 2)
    expected, before = delta(model), logits(model)
    with scaled_adapter(model, 0.25):
        for name, update in delta(model).items():
            torch.testing.assert_close(update, expected[name] * 0.25)
    assert torch.equal(logits(model), before)
    with scaled_adapter(model, 0.0), model.disable_adapter():
        untouched = logits(model)
    with scaled_adapter(model, 0.0):
        assert torch.equal(logits(model), untouched)


@pytest.mark.parametrize("form", ALL)
def test_tensors_of_one_adapter_share_a_dtype(base: nn.Module, form: str) -> None:
    model = start(base, form)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does on quantised bases
    align_adapter_dtype(model)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    logits(model)


def test_the_form_both_refuses_dropout(tiny_model: nn.Module) -> None:
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    layer = next(iter(adapted_layers(model).values()))
    with pytest.raises(AdapterError, match="dropout 0"):
        FORMS["both"].start(layer, "default", AdapterInit(torch.zeros(2, 32), torch.zeros(32, 2)))


def test_a_variant_of_peft_is_not_taken_for_plain_lora(tiny_model: nn.Module) -> None:
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(AdapterError, match="not plain LoRA"):
        adapted_layers(model)
