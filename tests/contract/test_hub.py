"""What an upload sends, to a hub on 127.0.0.1, and what is refused before anything is sent."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, running_hub
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

import forgetless
from forgetless.cli import main
from forgetless.errors import AdapterError, ArtefactError
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
        adapted(tiny_model, "both"),
        "you/model",
        target="merged",
        tokenizer=tiny_tokenizer,
        base_name="org/base",
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


def write_model(folder: Path) -> None:
    """What passes for a whole model."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")


def test_of_a_run_that_trained_every_weight_its_model_is_uploaded(
    hub: FakeHub, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_model(run / "model")
    (run / "model" / "README.md").write_text(card_of("forgetless"))
    forgetless.push_to_hub(run, "you/model")
    assert sorted(hub.files["you/model"]) == ["README.md", "config.json", "model.safetensors"]


def test_a_model_beside_an_adapter_is_never_uploaded_unasked(
    hub: FakeHub, exported: Path, tmp_path: Path
) -> None:
    write_model(exported / "model")
    forgetless.push_to_hub(exported, "you/adapter")
    assert sorted(hub.files["you/adapter"]) == ADAPTER
    run = tmp_path / "run"
    run.mkdir()
    write_model(run / "model")
    exported.rename(run / "adapter")
    with pytest.raises(AdapterError, match=r"expected one export, got .*adapter and .*model; name"):
        forgetless.push_to_hub(run, "you/run")
    assert "you/run" not in hub.files


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

    refused(tmp_path / "nowhere", "expected one exported adapter or model, got none; export it")
    live = adapted(make_tiny_model(), "both")
    live.peft_config["default"].init_lora_weights = "forgetless-both: run forgetless export first"
    live.save_pretrained(str(tmp_path / "live"))
    refused(tmp_path / "live", "got a training checkpoint of the form both.*forgetless export")
    forgetless.export(live, tmp_path / "local", base_name=str(tmp_path))
    refused(tmp_path / "local", r"got the local folder .*--model ORG/NAME")
    (exported / "README.md").unlink()
    refused(exported, "expected the model card README.md, found none")
    assert hub.created == []


def card_of(*tags: str, base: str = "org/base") -> str:
    return f"---\nbase_model: {base}\ntags: [{', '.join(tags)}]\n---\n# Mine\n"


def refusal(folder: Path) -> str:
    with pytest.raises((AdapterError, ArtefactError)) as caught:
        forgetless.push_to_hub(folder, "you/adapter")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_program_with_a_config_json_is_no_export(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"db_password": "hunter2"}')
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "README.md").write_text(card_of("forgetless"))
    assert "expected one exported adapter or model, got none" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "got none" in refusal(tmp_path)
    assert hub.files == {}


def test_only_the_files_of_one_kind_of_export_and_only_with_our_card(
    hub: FakeHub, exported: Path, tiny_model_path: Path
) -> None:
    for name in ("vocab.json", "tokenizer.json", "base.Q8_0.gguf"):
        (exported / name).write_text("secret")
    forgetless.push_to_hub(exported, "you/adapter")
    assert sorted(hub.files.pop("you/adapter")) == ADAPTER
    (exported / "README.md").write_text("# Somebody else's")
    assert "one without the tag forgetless" in refusal(exported)
    (tiny_model_path / "README.md").write_text(card_of("lora"))
    assert "one without the tag forgetless" in refusal(tiny_model_path)
    for name in ("config.json", "model.safetensors"):
        (exported / name).write_bytes((tiny_model_path / name).read_bytes())
    assert "got an adapter for PEFT and a whole model" in refusal(exported)
    assert hub.files == {}


def gguf_of(folder: Path, kind: str) -> Path:
    """The head of a GGUF file by its specification: magic, version, counts, one text."""
    folder.mkdir()
    texts = [("general.architecture", "llama"), ("general.type", kind)]
    body = b"".join(
        struct.pack("<Q", len(k)) + k.encode() + struct.pack("<IQ", 8, len(v)) + v.encode()
        for k, v in texts
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(texts)) + body
    (folder / "adapter.gguf").write_bytes(head)
    (folder / "README.md").write_text(card_of("forgetless"))
    return folder


def test_a_gguf_file_is_uploaded_where_it_is_an_adapter(hub: FakeHub, tmp_path: Path) -> None:
    folder = gguf_of(tmp_path / "adapter", "adapter")
    (folder / "base.Q8_0.gguf").write_bytes(b"GGUF")
    forgetless.push_to_hub(folder, "you/gguf")
    assert sorted(hub.files.pop("you/gguf")) == ["README.md", "adapter.gguf"]
    assert "type adapter, got model" in refusal(gguf_of(tmp_path / "model", "model"))
    whole = (folder / "adapter.gguf").read_bytes()
    for damaged in (b"", b"GGUF", whole[:60], b"GGML" + whole[4:]):
        (folder / "adapter.gguf").write_bytes(damaged)
        assert "expected a GGUF file, got another or a truncated one" in refusal(folder)
    assert hub.files == {}


@pytest.mark.parametrize("target", ["peft", "merged", "llama.cpp"])
@pytest.mark.parametrize("base", ["/abs/llama", "../bases/llama", "~/llama", "./llama"])
def test_a_local_base_is_refused_whatever_was_exported(
    hub: FakeHub, tiny_model: PreTrainedModel, tmp_path: Path, target: str, base: str
) -> None:
    if target == "llama.cpp":
        pytest.importorskip("gguf", reason="writes the file")
    model = adapted(tiny_model, "b", rank=2)
    folder = forgetless.export(model, tmp_path / "out", target=target, base_name=base)
    told = refusal(folder)
    assert "expected a base that others can load" in told
    assert "--model ORG/NAME" in told
    assert hub.created == []


def test_no_path_of_this_machine_is_uploaded(
    hub: FakeHub, tiny_model_path: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    data = tmp_path / "secretdir" / "patients.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps({"text": f"patient {i} is well"}) + "\n" for i in range(64)))
    for target in ("peft", "merged"):
        model = adapted(forgetless.load_model(str(tiny_model_path), dtype="float32").model, "b")
        report = forgetless.evaluate(model, tiny_tokenizer, gain=[str(data)], samples=1)
        forgetless.push_to_hub(
            model,
            f"you/{target}",
            target=target,
            base_name="org/base",
            tokenizer=tiny_tokenizer,
            max_rank=2,
            moments_data=data,
            report=report,
            samples="all",
        )
        files = hub.files[f"you/{target}"]
        assert {"README.md", "compression.json"} <= set(files)
        for name, content in files.items():
            assert str(tmp_path).encode() not in content, name
            assert b"secretdir" not in content, name


def test_links_out_of_the_folder_and_folders_are_refused(
    hub: FakeHub, exported: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "card.md"
    (exported / "README.md").rename(outside)
    (exported / "README.md").symlink_to(outside)
    assert "got a link to" in refusal(exported)
    (exported / "README.md").unlink()
    outside.rename(exported / "README.md")
    (exported / "compression.json").mkdir()
    assert "expected a file, got a folder" in refusal(exported)
    (exported / "compression.json").rmdir()
    (exported / "compression.json").symlink_to(tmp_path / "nowhere")
    assert "or a broken link" in refusal(exported)
    assert hub.created == []


def test_in_the_hubs_cache_links_are_what_files_are(
    hub: FakeHub, exported: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ADAPTER:
        (exported / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    forgetless.push_to_hub(snapshot, "you/adapter")
    assert sorted(hub.files["you/adapter"]) == ADAPTER


def test_an_adapter_that_others_cannot_open_is_refused(hub: FakeHub, exported: Path) -> None:
    config = exported / "adapter_config.json"
    good = json.loads(config.read_text())
    for change in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"peft_type": "LOHA"}):
        config.write_text(json.dumps(good | change))
        assert "expected plain LoRA, got" in refusal(exported)
    config.write_text(json.dumps(good))
    (exported / "adapter_model.safetensors").write_bytes(b"broken")
    assert "truncated or damaged" in refusal(exported)
    assert hub.created == []


@pytest.mark.parametrize("token", ["hf_SECRET x", "hf_SECRET\nX: y", "hf_SECRET\u00f6", "\n"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(
    hub: FakeHub, exported: Path, token: str
) -> None:
    with pytest.raises(AdapterError, match="token of printable ASCII") as caught:
        forgetless.push_to_hub(exported, "you/adapter", token=token)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert hub.tokens == set()


def test_white_space_around_a_token_is_left_out(hub: FakeHub, exported: Path) -> None:
    forgetless.push_to_hub(exported, "you/adapter", token="hf_mine\n")
    assert hub.tokens == {"Bearer hf_mine"}


def test_nothing_is_uploaded_into_a_public_repository_where_a_private_one_is_asked_for(
    hub: FakeHub, exported: Path
) -> None:
    forgetless.push_to_hub(exported, "you/adapter")
    hub.files["you/adapter"].clear()
    with pytest.raises(AdapterError, match="expected a private repository, got you/adapter, which"):
        forgetless.push_to_hub(exported, "you/adapter", private=True)
    assert hub.files["you/adapter"] == {}


def test_options_of_an_export_go_with_a_model_only(hub: FakeHub, exported: Path) -> None:
    with pytest.raises(AdapterError, match="expected scale with a PeftModel only"):
        forgetless.push_to_hub(exported, "you/adapter", scale=0.5)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "write access"),
        (403, "write access"),
        (400, "front matter"),
        (422, "front matter"),
        (413, "too large"),
        (429, "wait some minutes"),
        (418, "look this status up"),
        (500, "try again later"),
    ],
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
    assert ("front matter" in told) is (status in (400, 422))


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
