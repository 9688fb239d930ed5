"""What an upload sends, to a hub on 127.0.0.1, and what is refused before anything is sent."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, running_hub
from huggingface_hub import constants
from peft import PeftModel
from transformers import PreTrainedModel

import forgetless
from forgetless.cli import main
from forgetless.errors import AdapterError
from training_setup import ALL_FORMS, adapted

IDS = torch.arange(5, 29).reshape(2, 12)
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield found


@pytest.fixture
def exported(tiny_model: PreTrainedModel, tmp_path: Path) -> Path:
    """An export on a base that has a hub id."""
    return forgetless.export(adapted(tiny_model, "b"), tmp_path / "out", base_name="org/base")


def test_what_is_uploaded_loads_with_peft_alone(
    hub: FakeHub, exported: Path, tmp_path: Path, make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    done = forgetless.push_to_hub(exported, "you/adapter", private=True)
    assert done.url == f"{hub.endpoint}/you/adapter"
    assert list(done.files) == sorted(hub.files["you/adapter"]) == ADAPTER
    assert hub.created[0]["visibility"] == "private"
    assert "Bearer hf_secret" in hub.tokens
    there = tmp_path / "there"
    there.mkdir()
    for name, content in hub.files["you/adapter"].items():
        assert content == (exported / name).read_bytes()
        (there / name).write_bytes(content)
    reopened = PeftModel.from_pretrained(make_tiny_model(), str(there)).eval()
    with torch.no_grad():
        assert torch.isfinite(reopened(input_ids=IDS).logits).all()


def test_nothing_beside_the_exports_own_files_leaves_the_machine(
    hub: FakeHub, exported: Path
) -> None:
    for name in ("train.jsonl", "record.json", ".env", "optimizer.pt", "training_args.bin"):
        (exported / name).write_text("secret")
    (exported / "data").mkdir()
    (exported / "data" / "config.json").write_text("secret")
    forgetless.push_to_hub(exported, "you/adapter")
    assert sorted(hub.files["you/adapter"]) == ADAPTER


def test_other_files_of_the_repository_stay(hub: FakeHub, exported: Path) -> None:
    hub.files["you/adapter"] = {"LICENSE": b"mine", "README.md": b"old"}
    forgetless.push_to_hub(exported, "you/adapter")
    assert hub.files["you/adapter"]["LICENSE"] == b"mine"
    assert hub.files["you/adapter"]["README.md"] == (exported / "README.md").read_bytes()


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_live_model_is_exported_on_the_way(
    hub: FakeHub, tiny_model: PreTrainedModel, form: Any
) -> None:
    model = adapted(tiny_model, form)
    forgetless.push_to_hub(model, "you/adapter", base_name="org/base", method="lora-null")
    files = hub.files["you/adapter"]
    assert json.loads(files["adapter_config.json"])["init_lora_weights"] is True
    assert "2503.02659" in files["README.md"].decode()


def test_a_merged_model_is_uploaded_with_tokenizer_and_card(
    hub: FakeHub, tiny_model: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    forgetless.push_to_hub(
        adapted(tiny_model, "both"), "you/model", target="merged", tokenizer=tiny_tokenizer
    )
    files = hub.files["you/model"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert "# Merged model" in files["README.md"].decode()


def test_of_a_run_its_adapter_is_uploaded(hub: FakeHub, exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    exported.rename(run / "adapter")
    (run / "record.json").write_text("{}")
    forgetless.push_to_hub(run, "you/adapter")
    assert sorted(hub.files["you/adapter"]) == ADAPTER


def test_what_is_no_export_is_refused_before_anything_is_sent(
    hub: FakeHub,
    exported: Path,
    make_tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(AdapterError, match=message) as caught:
            forgetless.push_to_hub(folder, "you/adapter")
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "expected an exported adapter or model, got none; export it")
    live = adapted(make_tiny_model(), "both")
    live.peft_config["default"].init_lora_weights = "forgetless-both: run forgetless export first"
    live.save_pretrained(str(tmp_path / "live"))
    refused(tmp_path / "live", "got a training checkpoint of the form both.*forgetless export")
    forgetless.export(live, tmp_path / "local", base_name=str(tmp_path))
    refused(tmp_path / "local", r"got the local folder .*--model ORG/NAME")
    (exported / "README.md").unlink()
    refused(exported, "expected the model card README.md, found none")
    assert hub.created == []


def test_options_of_an_export_go_with_a_model_only(hub: FakeHub, exported: Path) -> None:
    with pytest.raises(AdapterError, match="expected scale with a PeftModel only"):
        forgetless.push_to_hub(exported, "you/adapter", scale=0.5)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "write access"), (403, "write access"), (400, "front matter")],
)
def test_a_refusal_of_the_hub_is_one_line(
    hub: FakeHub, exported: Path, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = status
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(exported), "you/adapter"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("forgetless: push: the hub refused you/adapter")
    assert message in told
    assert len(told.splitlines()) == 1


def test_no_token_no_network_and_a_bad_name_are_one_line_each(
    hub: FakeHub, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="expected a repository name such as you/name"):
        forgetless.push_to_hub(exported, "no name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match=r"could not reach the hub .*HF_HUB_OFFLINE"):
        forgetless.push_to_hub(exported, "you/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(AdapterError, match="could not reach the hub"):
            forgetless.push_to_hub(exported, "you/adapter")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(AdapterError, match=r"expected a token .*hf auth login"):
        forgetless.push_to_hub(exported, "you/adapter")


def test_the_command_prints_where_it_is(
    hub: FakeHub, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(exported), "you/adapter", "--private", "--json"])
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"url": f"{hub.endpoint}/you/adapter", "commit": "abc", "files": ADAPTER}
