"""`inspect`: what is told of adapters, moments and models is what PEFT and torch say of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from forgetless.adapters.attach import attach
from forgetless.calibration.engine import SiteMoments
from forgetless.calibration.store import load_moments
from forgetless.errors import ArtefactError, CalibrationError, ForgetlessError
from forgetless.evaluation.weight_movement import measure_weights
from forgetless.experiments.inspecting import inspect

PRESERVE = [f"The capital of country {i} is city {i * 7 % 13}, and it rains." for i in range(40)]
CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 8, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.self.*": 3}},
]


def dense_updates(base: nn.Module, config: LoraConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Save an adapter; its update of each layer as PEFT merges it, in float64."""
    model = get_peft_model(copy.deepcopy(base).double(), config)
    model.save_pretrained(str(folder))
    before = {name: tensor.clone() for name, tensor in base.double().state_dict().items()}
    after = model.merge_and_unload().state_dict()
    return {n: after[n] - before[n] for n in after if not torch.equal(after[n], before[n])}


@pytest.mark.parametrize("options", CONFIGS, ids=["plain", "rslora", "patterns"])
def test_the_update_size_is_that_of_the_merged_difference(
    options: dict[str, Any], tiny_model_path: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    updates = dense_updates(base, config, tmp_path / "theirs")
    found = inspect(tmp_path / "theirs", model=str(tiny_model_path))
    whole = torch.stack([update.norm() for update in updates.values()]).norm()
    assert found["update_norm"] == pytest.approx(float(whole), rel=1e-6)
    largest = max(updates, key=lambda name: float(updates[name].norm()))
    assert f"{found['largest_update']['layer']}.weight" == largest
    kept = torch.stack([base.state_dict()[name].norm() for name in updates]).norm()
    assert found["relative_update"] == pytest.approx(float(whole / kept), rel=1e-2)  # bf16 base
    assert found["adapted_layers"] == len(updates) == 4
    assert found["rank"] == ([2, 4] if "rank_pattern" in options else 4)
    assert found["target_modules"] == ["down_proj", "q_proj"]
    assert found["form"] == "plain LoRA"
    assert found["beyond_plain_lora"] == []


@pytest.fixture
def calibrated(
    make_tiny_model: Callable[..., nn.Module], tiny_tokenizer: object, tmp_path: Path
) -> tuple[Path, Path]:
    """A folder with a trained checkpoint of the form `both`, and a file of second moments."""
    model = attach(
        make_tiny_model(),
        tiny_tokenizer,  # type: ignore[arg-type]
        method={"name": "lora-null", "trains": "both", "rank": 4},
        preserve_data=PRESERVE,
        cache=tmp_path / "cache",
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(tmp_path / "both"))
    [moments] = (tmp_path / "cache").glob("moments-*")
    return tmp_path / "both", moments


def test_drift_of_a_both_checkpoint_is_that_of_its_dense_update(
    calibrated: tuple[Path, Path], tiny_model_path: Path
) -> None:
    folder, file = calibrated
    found = inspect(folder, model=str(tiny_model_path), moments=file)
    assert found["form"] == "both"
    stored = load_moments(file, {})
    assert isinstance(stored, SiteMoments)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict()
    tensors = {k: t.double() for k, t in load_file(folder / "adapter_model.safetensors").items()}
    drifts, sizes = [], []
    for name in stored.site_of:
        a, b, a0, b0 = (
            tensors[f"base_model.model.{name}.{part}.weight"]
            for part in ("lora_A", "lora_B", "lora_fixed_A", "lora_fixed_B")
        )
        delta = (b0 + b) @ (a0 + a) - b0 @ a0
        moment = stored.of(name).mean_DD().double()
        weight = base[f"{name}.weight"].double()
        drifts.append(
            float(torch.trace(delta @ moment @ delta.T) / torch.trace(weight @ moment @ weight.T))
        )
        sizes.append(delta.norm())
    assert found["drift"] == pytest.approx(sum(drifts) / len(drifts), rel=1e-4)
    assert found["update_norm"] == pytest.approx(float(torch.stack(sizes).norm()), rel=1e-6)


def test_moments_are_described_from_their_header_and_checked_against_the_model(
    calibrated: tuple[Path, Path],
    make_tiny_model: Callable[..., nn.Module],
    save_model: Callable[..., Path],
) -> None:
    folder, file = calibrated
    stored = load_moments(file, {})
    assert stored is not None
    found = inspect(file)
    assert found["kind"] == "second moments"
    assert found["num_tokens"] == stored.num_tokens
    assert found["sites"] == len(stored.moments)
    assert found["widths"] == [32, 64]
    assert found["targets"] == 14
    assert found["dtype"] == "float32"
    assert inspect(file.parent)["second_moments"] == [found]
    other = save_model(make_tiny_model(seed=5), "other")
    with pytest.raises(ArtefactError, match="got those of another model"):
        inspect(folder, model=str(other), moments=file)


def test_moments_of_other_layers_are_refused(
    calibrated: tuple[Path, Path], tiny_model_path: Path
) -> None:
    stored = load_moments(calibrated[1], {})
    assert stored is not None
    narrow = SiteMoments(stored.moments, {"model.layers.9.q_proj": next(iter(stored.moments))})
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CalibrationError, match="got none of them"):
        measure_weights(model, narrow)


def test_a_base_model_is_described_without_its_weights(
    tiny_model: nn.Module, tiny_model_path: Path
) -> None:
    found = inspect(tiny_model_path)
    assert found["kind"] == "base model"
    assert found["parameters"] == sum(p.numel() for p in tiny_model.parameters())
    assert found["targets"] == 14
    assert found["skipped_layers"] == {"model.embed_tokens": "embedding", "lm_head": "output head"}
    assert found["chat_template"] is True
    (tiny_model_path / "model.safetensors").unlink()
    assert inspect(tiny_model_path)["parameters"] is None


def test_what_a_plain_lora_cannot_hold_is_named(tiny_model_path: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], bias="lora_only", use_dora=False)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "theirs"))
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    found = inspect(tmp_path / "theirs")
    assert found["beyond_plain_lora"] == ["bias='lora_only'", "init_lora_weights='pissa'"]
    assert found["update_norm"] is None
    assert any("embed_tokens" in name for name in found["other_tensors"])


def test_an_adapter_of_another_kind_is_named_as_such(tiny_model_path: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "theirs"))
    assert inspect(tmp_path / "theirs")["peft_type"] == "PROMPT_TUNING"


@pytest.mark.parametrize("name", ["nothing", "folder", "file", "cut.safetensors", "record.json"])
def test_anything_else_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ForgetlessError) as failure:
        inspect(tmp_path / name)
    assert str(tmp_path / name) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_only_an_adapter_is_measured(calibrated: tuple[Path, Path]) -> None:
    with pytest.raises(ArtefactError, match="measure an adapter, got second moments"):
        inspect(calibrated[1], model="demo")


@pytest.mark.parametrize("init", [["pissa"], {"a": 1}])
def test_a_configuration_of_odd_types_is_described_or_refused_in_one_line(
    tiny_model_path: Path, tmp_path: Path, init: object
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "a"))
    path = tmp_path / "a" / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"init_lora_weights": init}))
    assert inspect(tmp_path / "a")["beyond_plain_lora"] == [f"init_lora_weights={init!r}"]
    path.write_text(json.dumps(written | {"lora_alpha": None}))
    with pytest.raises(ArtefactError, match="numeric lora_alpha"):
        inspect(tmp_path / "a")
