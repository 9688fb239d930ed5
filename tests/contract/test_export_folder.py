"""What an export refuses to write into: other exports, and cards of somebody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import forgetless
from forgetless.errors import AdapterError, ForgetlessWarning
from training_setup import adapted


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("first", "second"),
    [("peft", "merged"), ("merged", "peft"), ("peft", "llama.cpp"), ("llama.cpp", "peft")],
)
def test_two_kinds_of_export_do_not_share_a_folder(
    tiny_model: PreTrainedModel, tmp_path: Path, first: str, second: str
) -> None:
    if "llama.cpp" in (first, second):
        pytest.importorskip("gguf", reason="writes the file")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model, config)
    forgetless.export(model, tmp_path / "out", target=first)
    before = contents(tmp_path / "out")
    with pytest.raises(AdapterError, match=r"which holds .*; choose another folder"):
        forgetless.export(model, tmp_path / "out", target=second)
    assert contents(tmp_path / "out") == before
    forgetless.export(model, tmp_path / "out", target=first, scale=0.5)
    assert contents(tmp_path / "out") != before


@pytest.mark.parametrize("target", ["peft", "merged"])
def test_a_card_of_somebody_else_is_not_replaced(
    tiny_model: PreTrainedModel, tmp_path: Path, target: str
) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(AdapterError, match=r"README\.md, which would be replaced; choose another"):
        forgetless.export(adapted(tiny_model), tmp_path, target=target)
    assert contents(tmp_path) == {"README.md": b"# My project\n"}


def test_a_config_json_that_is_no_models_is_no_export(
    tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    forgetless.export(adapted(tiny_model), tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_samples_without_a_report_are_warned_of(
    tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.warns(ForgetlessWarning, match="no samples, though all were asked for"):
        forgetless.export(adapted(tiny_model), tmp_path, samples="all")
