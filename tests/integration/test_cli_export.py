"""`forgetless export` as a user meets it: targets, a cut rank, mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from run_setup import recipe_of, write_data
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from forgetless.adapters.lint import lint_adapter
from forgetless.cli import main


@pytest.fixture
def theirs(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's adapter with a rank pattern, beside data, in the working directory."""
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    config = LoraConfig(
        r=12,
        rank_pattern={"down_proj": 6},
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
    )
    get_peft_model(base, config).save_pretrained("theirs")
    return Path("theirs")


def status(*arguments: str | Path) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_cut_adapter_is_written_for_an_engine_and_can_be_measured(
    theirs: Path, tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = '{path: data/train.jsonl, prompt: "Q: {question}\\nA:", completion: " {answer}"}'
    command = ["export", theirs, "out", "--target", "vllm", "--max-rank", "4"]
    assert status(*command, "--moments-data", data) == 0
    shown = capsys.readouterr()
    out = words(shown.out)
    assert "LoRA of rank 4, padded with zeros to 8 for vllm: out" in out
    assert "rank 12 cut to 4, metric train.jsonl: " in out
    assert "relative error" in out
    assert "drift in that metric" in out
    assert "identity" not in words(shown.err)
    assert lint_adapter("out", "vllm") == []
    figures = json.loads(Path("out/compression.json").read_text())
    assert f"{figures['error']:.2e} overall, {figures['worst_error']:.2e} at the worst" in out

    assert "forgetless evaluate RECIPE --adapter out" in out
    recipe = recipe_of(tiny_model_path, tmp_path / "data", tmp_path / "run").resolved()
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert status("evaluate", "recipe.yaml", "--adapter", "out") == 0
    assert "gain" in capsys.readouterr().out


def test_self_and_no_data_at_all_are_metrics_too(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "{self: true, limit: 4, max_length: 16}"
    assert status("export", theirs, "one", "--max-rank", "2", "--moments-data", data) == 0
    shown = capsys.readouterr()
    assert "metric self: " in shown.out
    assert "compression tokens for site" in words(shown.err)
    assert status("export", theirs, "two", "--max-rank", "2") == 0
    shown = capsys.readouterr()
    assert "metric identity: every input direction weighs the same" in words(shown.out)
    assert "is cut to 2 in the identity metric" in words(shown.err)
    assert status("export", theirs, "three", "--max-rank", "12", "--moments-data", "self") == 0
    shown = capsys.readouterr()
    assert "nothing to cut" in words(shown.err)
    assert "relative error" not in shown.out


def test_json_holds_the_figures_of_the_cut(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", theirs, "out", "--target", "vllm", "--max-rank", "4", "--json"]
    assert status(*command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["target"], found["kind"], found["rank"]) == ("vllm", "adapter", 4)
    figures = json.loads(Path("out/compression.json").read_text())
    assert found["compression"]["error"] == figures["error"]


def test_merge_is_target_merged(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("export", theirs, "one", "--merge") == 0
    assert status("export", theirs, "two", "--target", "merged") == 0
    assert "added in float32, saved as float32: two" in words(capsys.readouterr().out)
    one, two = (load_file(Path(n) / "model.safetensors") for n in ("one", "two"))
    assert all(two[name].equal(tensor) for name, tensor in one.items())
    assert Path("two/tokenizer.json").is_file()
    assert status("export", theirs, "three", "--merge", "--max-rank", "2") == 0
    out = words(capsys.readouterr().out)
    card = words(Path("three/README.md").read_text())
    assert "rank cut from 12 to 2, gain and retention not measured since" in card
    assert "update of rank 2 added" in out
    assert "forgetless evaluate" not in out  # a whole model is no adapter to evaluate
    assert Path("three/compression.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--target", "triton"],
            "target: expected one of peft, vllm, sglang, tgi, llama.cpp, merged",
        ),
        (["--merge", "--target", "vllm"], "--merge is --target merged"),
        (["--moments-data", "self"], "moments data: expected a max rank to cut to, got none"),
        (["--max-rank", "0"], "expected a whole number, 1 or more, got 0"),
        (["--max-rank", "2", "--moments-data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--max-rank", "2", "--moments-data", "{path"], "which is no YAML; quote"),
        (["--max-rank", "2", "--moments-data", "{pth: x}"], "moments data"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    theirs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("export", theirs, "out", *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("forgetless: ")
    assert message in last
    assert not Path("out").exists()
