"""Export, merge and scale refuse what plain LoRA cannot hold, write whole files, leave no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from forgetless.adapters import plain_files
from forgetless.adapters.export import export
from forgetless.adapters.forms import adapted_layers, form_of
from forgetless.adapters.merge import save_merged
from forgetless.adapters.round_trip import check_round_trip
from forgetless.adapters.scale import scaled_adapter
from forgetless.errors import AdapterError
from forgetless.models import load as load_module
from forgetless.models.load import base_reference

IDS = torch.arange(5, 29).reshape(2, 12)


def lora(model: nn.Module, adapter: str = "default", **options: Any) -> PeftModel:
    """PEFT's LoRA, B away from 0."""
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
        return model
    return get_peft_model(model, config, adapter_name=adapter)  # type: ignore[arg-type]


CANNOT_HOLD = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "target_parameters": {"target_parameters": ["mlp.down_proj.weight"]},
    "output head": {"target_modules": ["q_proj", "lm_head"]},
    "which changes the base": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("what", CANNOT_HOLD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_plain_lora_cannot_hold_is_refused(
    make_tiny_model: Any, tmp_path: Path, what: str
) -> None:
    base = make_tiny_model(attention_bias=True, tie_word_embeddings=False)
    model = lora(base, **CANNOT_HOLD[what])
    for attempt in (export, save_merged):
        with pytest.raises(AdapterError, match=what) as caught:
            attempt(model, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(AdapterError, match=what), scaled_adapter(model, 0.5):
        pass
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_refused(tiny_model: nn.Module, tmp_path: Path) -> None:
    model = lora(tiny_model)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        save_merged(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_that_lost_something_fails_the_round_trip(
    tiny_model: nn.Module, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = lora(tiny_model.to(dtype))
    export(model, tmp_path)
    check_round_trip(model, tmp_path, IDS)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor * 3 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="expected the live adapter's update at layer"):
        check_round_trip(model, tmp_path, IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_that_lost_an_update_too_small_for_the_logits_is_seen(
    tiny_model: nn.Module, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = lora(tiny_model.to(dtype))
    for layer in adapted_layers(model).values():
        layer.lora_B["default"].weight.data.mul_(1e-5)
    export(model, tmp_path)
    assert check_round_trip(model, tmp_path, IDS).max_update_error < 1e-6
    export(model, tmp_path, scale=0.0)
    with pytest.raises(AdapterError, match=r"1\.00e\+00 of its norm away"):
        check_round_trip(model, tmp_path, IDS)


def test_a_merge_that_transformers_refuses_is_one_line(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    model = lora(tiny_model)
    tiny_model.generation_config.temperature = 0.5  # without do_sample, as in some published bases
    with pytest.raises(AdapterError, match=r"generation_config\.json") as caught:
        save_merged(model, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_the_round_trip_leaves_the_model_as_found(tiny_model: nn.Module, tmp_path: Path) -> None:
    model = lora(lora(tiny_model), "second", target_modules=["v_proj"])
    model.base_model.set_adapter(["default", "second"])
    export(model, tmp_path)
    model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    by_hand = next(p for name, p in model.named_parameters() if "lora_A.default" in name)
    by_hand.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    check_round_trip(model, tmp_path, IDS)
    assert list(model.active_adapters) == ["default", "second"]
    assert [module.training for module in model.modules()] == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_form_with_other_frozen_tensors_is_named(tiny_model: nn.Module) -> None:
    model = lora(tiny_model)
    for layer in adapted_layers(model).values():
        layer.frozen_peft_weight_names = {"default": ("lora_A", "lora_B")}
    with pytest.raises(AdapterError, match="got lora_A, lora_B"):
        form_of(model)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [SafetensorError("disk full"), OSError(28, "No space left")])
def test_an_export_that_fails_leaves_what_was_there(
    tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    export(lora(tiny_model), tmp_path)
    before = contents(tmp_path)

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(plain_files, "save_file", full)
    model = lora(tiny_model, r=2, target_modules=["v_proj"])
    with pytest.raises(AdapterError, match="could not write"):
        export(model, tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_one_line(tiny_model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = lora(tiny_model)
    with pytest.raises(AdapterError, match="choose another folder"):
        export(model, tmp_path / "file")


def recorded_base(folder: Path) -> str | None:
    name: str | None = json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    return name


def test_an_export_names_its_base_so_that_peft_finds_it(
    tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "demo-model").mkdir()
    monkeypatch.setattr(load_module, "demo_model_path", lambda: tmp_path / "demo-model")
    monkeypatch.chdir(tmp_path)
    assert base_reference("base") == str(tmp_path / "base")
    model = lora(tiny_model)
    for name, expected in {
        "base": str(tmp_path / "base"),
        "demo": str(tmp_path / "demo-model"),
        "org/name": "org/name",
    }.items():
        export(model, tmp_path / "out", base_name=name)
        assert recorded_base(tmp_path / "out") == expected


def test_the_round_trip_works_beside_an_adapter_with_modules_to_save(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    model = lora(lora(tiny_model, "other", modules_to_save=["lm_head"]), "default")
    model.set_adapter("default")
    export(model, tmp_path)
    check_round_trip(model, tmp_path, IDS)
    assert sorted(model.peft_config) == ["default", "other"]


def test_a_merge_holds_nothing_of_another_adapters_trained_modules(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    names = {name for name in tiny_model.state_dict() if name != "lm_head.weight"}
    norm = tiny_model.model.norm.weight.clone()
    model = lora(lora(tiny_model, "other", modules_to_save=["norm"]), "default")
    model.set_adapter("default")
    save_merged(model, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == names
    assert torch.equal(found["model.norm.weight"], norm)


def test_a_merge_onto_a_full_disk_leaves_no_file(
    tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora(tiny_model)

    def full(folder: str, **_: object) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_model, "save_pretrained", full)
    with pytest.raises(AdapterError, match="merge: could not write"):
        save_merged(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
