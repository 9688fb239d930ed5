"""Loading: what is no function of the untouched base is refused, and the base is left bare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from forgetless.adapters.load import load_adapter
from forgetless.errors import AdapterError, ArtefactError, ForgetlessError

IDS = torch.arange(5, 29).reshape(2, 12)


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora(model: nn.Module, **options: Any) -> PeftModel:
    """PEFT's LoRA with random factors."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 6
    return adapted


def saved(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Save a LoRA of the model; the model again."""
    adapted = lora(model, **options)
    adapted.save_pretrained(str(folder))
    return adapted.unload()


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_pissa_folder_is_refused_and_its_conversion_is_the_trained_function(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    model = get_peft_model(
        tiny_model,  # type: ignore[arg-type]
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    )
    model.save_pretrained(str(tmp_path / "start"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= 1.2
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "raw"))
    edit_config(tmp_path / "start", init_lora_weights=True)
    model.save_pretrained(
        str(tmp_path / "converted"),
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    base = model.unload()
    base.load_state_dict(before)
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        load_adapter(base, tmp_path / "raw")
    found = logits(load_adapter(base, tmp_path / "converted"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "init", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "not-known-yet", 3]
)
def test_a_start_that_changes_the_base_is_refused(
    tiny_model: nn.Module, tmp_path: Path, init: object
) -> None:
    base = saved(tiny_model, tmp_path)
    edit_config(tmp_path, init_lora_weights=init)
    with pytest.raises(AdapterError, match="which changes the base"):
        load_adapter(base, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_keeps_the_base_is_loaded(
    tiny_model: nn.Module, tmp_path: Path, init: object
) -> None:
    adapted = lora(tiny_model)
    expected = logits(adapted)
    adapted.save_pretrained(str(tmp_path))
    edit_config(tmp_path, init_lora_weights=init)
    assert torch.equal(logits(load_adapter(adapted.unload(), tmp_path)), expected)


@pytest.mark.parametrize("change", [{"bias": "all"}, {"layer_replication": [[0, 2], [0, 2]]}])
def test_an_adapter_that_changes_the_base_itself_is_refused(
    tiny_model: nn.Module, tmp_path: Path, change: dict[str, object]
) -> None:
    base = saved(tiny_model, tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(AdapterError, match="change the base itself"):
        load_adapter(base, tmp_path)  # type: ignore[arg-type]


def test_dora_is_refused_by_its_name(tiny_model: nn.Module, tmp_path: Path) -> None:
    base = saved(tiny_model, tmp_path, use_dora=True)
    with pytest.raises(AdapterError, match="DoRA, which cannot be measured as plain LoRA"):
        load_adapter(base, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[]", ArtefactError, "expected a mapping, got list"),
        ('{"peft_type": "LO', ArtefactError, "truncated or damaged"),
        ('{"peft_type": "IA3"}', AdapterError, "expected peft_type LORA, got IA3"),
        ('{"peft_type": "LORA", "target_parameters": "x"}', AdapterError, "LoRA configuration"),
        ('{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}', AdapterError, "not fit"),
        ('{"peft_type": "LORA", "r": "x", "target_modules": ["q_proj"]}', AdapterError, "not fit"),
    ],
)
def test_a_bad_configuration_is_one_line(
    tiny_model: nn.Module, tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    base = saved(tiny_model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_adapter(base, tmp_path)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def break_config(folder: Path) -> None:
    edit_config(folder, r=0)


def break_shapes(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v[..., :3].contiguous() for k, v in load_file(path).items()}, path)


def break_names(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k.replace("layers.1", "layers.7"): v for k, v in load_file(path).items()}, path)


def break_values(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(path).items()}, path)


BREAKS = [break_config, break_shapes, break_names, break_values]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda f: f.__name__)
def test_a_failed_load_leaves_the_base_bare(
    tiny_model: nn.Module, tmp_path: Path, damage: Any
) -> None:
    saved(tiny_model, tmp_path)
    damage(tmp_path)
    tiny_model.requires_grad_(True)
    tiny_model.get_submodule("model.layers.0").train()
    names = [name for name, _ in tiny_model.named_modules()]
    modes = [module.training for module in tiny_model.modules()]
    with pytest.raises(ForgetlessError):
        load_adapter(tiny_model, tmp_path)  # type: ignore[arg-type]
    assert not any(isinstance(module, BaseTunerLayer) for module in tiny_model.modules())
    assert [name for name, _ in tiny_model.named_modules()] == names
    assert [module.training for module in tiny_model.modules()] == modes
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())
    assert not hasattr(tiny_model, "peft_config")


@pytest.mark.parametrize("damage", BREAKS, ids=lambda f: f.__name__)
def test_a_failed_load_beside_an_adapter_leaves_that_one_as_it_was(
    tiny_model: nn.Module, tmp_path: Path, damage: Any
) -> None:
    base = saved(tiny_model, tmp_path)
    model = lora(base, target_modules=["v_proj"])
    expected = logits(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    damage(tmp_path)
    with pytest.raises(ForgetlessError):
        load_adapter(model, tmp_path, adapter="second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert not any("second" in name for name, _ in model.named_modules())


def test_a_name_in_use_is_refused_and_that_adapter_stays(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    base = saved(tiny_model, tmp_path)
    model = load_adapter(base, tmp_path)  # type: ignore[arg-type]
    expected = logits(model)
    with pytest.raises(AdapterError, match="already there"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)
