"""The command line as a user meets it: verbs, one-line mistakes, statuses."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from run_setup import recipe_of, write_data
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from forgetless.__main__ import main as enter
from forgetless.cli import main
from forgetless.console import Level, TerminalProgress
from forgetless.errors import ForgetlessWarning
from forgetless.experiments import run as run_module
from forgetless.experiments.progress import warnings_heard
from forgetless.methods import ALL_METHODS, make_any_method
from forgetless.recipe import load_recipe
from forgetless.training.quiet import libraries_quiet

VERBS = (
    "demo",
    "new",
    "run",
    "calibrate",
    "train",
    "evaluate",
    "sweep",
    "report",
    "export",
    "push",
    "inspect",
    "methods",
    "schema",
)


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file on tiny data, in an empty working directory."""
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    tree = recipe_of(tiny_model_path, tmp_path / "data", tmp_path / "out").resolved()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def status(*arguments: str | Path) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_run_and_what_can_be_done_with_it(
    recipe: Path, tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("run", recipe) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'report.html'}".replace("\n", "") in out.replace("\n", "")
    assert status("run", recipe) == 0
    assert "finished already" in " ".join(capsys.readouterr().err.split())

    def printed(*arguments: str | Path) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert status(*arguments, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    again = printed("run", recipe, "--quiet")
    assert (tmp_path / "out" / "record.json").samefile(again["record"])
    assert {row["item"] for row in again["figures"]} == {"task", "facts"}
    card = Path(again["adapter"], "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["library_name"], matter.get("base_model")) == ("peft", None)
    assert f"{tiny_model_path.name} (a local model)" in card
    assert "| Gained: task, NLL |" in card
    assert "2503.02659" in card
    assert str(tmp_path) not in card
    assert status("run", recipe, "label=another", "-q") == 0
    assert not capsys.readouterr().err
    assert "another" in Path(again["adapter"], "README.md").read_text()

    described = printed("inspect", tmp_path / "out")
    assert (described["kind"], described["state"]) == ("run", "finished")
    assert described["adapter"]["rank"] == 4
    assert printed("report", tmp_path / "out", "--output", tmp_path / "one.html")["figures"]
    written = printed("export", tmp_path / "out", tmp_path / "plain")
    assert (written["kind"], written["rank"]) == ("adapter", 4)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "plain").iterdir()} == names
    measured = printed("evaluate", recipe, "evaluation.scales=[]")["reports"]
    assert [item["name"] for item in measured[0]["items"]] == ["task", "facts"]

    assert status("report", tmp_path / "out", "--output", tmp_path / "two.html") == 0
    assert (tmp_path / "two.html").is_file()
    assert status("report", tmp_path / "out", "--output", recipe) == 2
    assert "recipe.yaml: expected a new file, or a report" in capsys.readouterr().err
    assert "train_data" in recipe.read_text()

    assert status("export", tmp_path / "out", tmp_path / "half", "--scale", "0.5") == 0
    assert "logits differ by at most" in capsys.readouterr().out
    assert status("export", tmp_path / "out", tmp_path / "merged", "--merge") == 0
    assert "shards" not in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size > 0
    assert status("export", tmp_path / "out", tmp_path / "half") == 2
    assert "new or empty folder" in capsys.readouterr().err

    figures = tmp_path / "figures.json"
    assert status("evaluate", recipe, "evaluation.scales=[0.5]", "--output", figures) == 0
    shown = capsys.readouterr()
    assert "| scale 1 |" in shown.out.replace("  ", " ")
    assert re.search(r"\| [\d.]+ [+−][\d.e-]+ \([+−]?[\d.e-]+ to [+−]?[\d.e-]+\) \|", shown.out)
    assert "on cpu in float32" in " ".join(shown.err.split())
    assert [report["scale"] for report in json.loads(figures.read_text())] == [1.0, 0.5]


def test_train_then_run_goes_on_from_the_trained_adapter(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("calibrate", recipe, "method=lora-null", "method.rank=4") == 0
    assert "tokens at" in capsys.readouterr().out
    assert status("train", recipe, "method=lora-null", "method.rank=4") == 0
    assert "steps" in capsys.readouterr().out
    weights = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/checkpoints").iterdir()}
    assert status("run", recipe, "method=lora-null", "method.rank=4") == 0
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/checkpoints").iterdir()}
    assert weights == after


def test_somebody_elses_adapter_is_measured(
    recipe: Path,
    tmp_path: Path,
    tiny_model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    (tmp_path / "data" / "train.jsonl").unlink()  # theirs were others
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert status("evaluate", recipe, "dtype=bfloat16", "--adapter", tmp_path / "theirs") == 0
    shown = capsys.readouterr()
    assert "warning: evaluation: the base computes in bfloat16" in " ".join(shown.err.split())
    assert "UserWarning" not in shown.err
    assert "update size" in shown.out
    assert "|" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


def test_figures_are_written_only_where_they_can_be_and_that_is_checked_first(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("forgetless.experiments.measure_adapter.measure_adapter", None)
    (tmp_path / "figures").mkdir()
    assert status("evaluate", recipe, "--output", tmp_path / "figures") == 2
    assert "got a folder; add a file name" in capsys.readouterr().err
    assert status("evaluate", recipe, "--output", recipe / "figures.json") == 2
    assert "cannot be written to; choose another place" in capsys.readouterr().err
    for content in ("my thesis", '{"items": 1}', "[1]"):
        (tmp_path / "thesis.json").write_text(content)
        assert status("evaluate", recipe, "--output", tmp_path / "thesis.json") == 2
        assert "thesis.json: expected a new file, or figures" in capsys.readouterr().err
        assert (tmp_path / "thesis.json").read_text() == content


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "the device is out of memory; lower",
        ),
        (PermissionError(13, "Permission denied", "there"), "there: Permission denied; check the"),
    ],
)
def test_a_full_device_and_an_unwritable_file_are_one_line(
    error: Exception,
    line: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("forgetless.recipe.load_recipe", fail)
    assert status("run", recipe) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"forgetless: {line}")
    assert err.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("forgetless.recipe.load_recipe", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["run", str(recipe)])


def test_our_warnings_are_heard_and_the_libraries_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    heard: list[str] = []
    with warnings_heard(heard.append):
        for _ in range(2):
            warnings.warn("a row is long", ForgetlessWarning, stacklevel=1)
    assert heard == ["a row is long"]
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        with libraries_quiet():
            logging.getLogger("transformers.trainer").warning("mtime may not be reliable")
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.get_verbosity() == transformers_logging.WARNING
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(before)
    assert "mtime" not in capsys.readouterr().err


def test_a_log_hears_of_a_long_phase_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    progress = TerminalProgress(Console(file=log, width=80))
    now = [0.0]
    monkeypatch.setattr("forgetless.console.time.monotonic", lambda: now[0])
    with progress.phase("data"):
        for done in range(100):
            now[0] += 1.0
            progress.advance(done, 100, "train")
    assert [line.strip() for line in log.getvalue().splitlines()[:-1]] == [
        "data, train: 29 of 100",
        "data, train: 59 of 100",
        "data, train: 89 of 100",
    ]


def test_a_command_to_paste_stands_unwrapped_on_a_line_of_its_own() -> None:
    log = io.StringIO()
    command = shlex.join(["forgetless", "run", "my recipes/r.yaml", *["label='a [b]  c'"] * 9])
    TerminalProgress(Console(file=log, width=80)).command(command)
    assert log.getvalue() == f"{command}\n"


def test_ctrl_c_while_modules_load_gives_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "forgetless.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "forgetless.cli")
    monkeypatch.setattr("sys.meta_path", [Stop(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        enter()
    assert ended.value.code == 130


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_ctrl_c_in_a_short_command_names_the_command_to_run_again(
    verb: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    module = "measure_adapter.measure_adapter" if verb == "evaluate" else "exporting.export_folder"
    monkeypatch.setattr(f"forgetless.experiments.{module}", stop)
    monkeypatch.setattr("sys.argv", ["forgetless", verb, "recipe.yaml", "out put"])
    assert status(verb, recipe, *(["x"] if verb == "export" else [])) == 130
    told = capsys.readouterr().err.splitlines()
    assert "stopped" in told[-2]
    assert told[-1] == f"forgetless {verb} recipe.yaml 'out put'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "recipe.yaml", "trainning.epochs=2"], "did you mean `training`"),
        (["run", "recipe.yaml", "method={name: sc-lora, beta: 2}"], "0..1 or auto, got 2"),
        (["run", "recipe.yaml", "method={name: lora, rank: 999}"], "999; lower the rank"),
        (["run", "recipe.yaml", "model=nowhere/at-all"], "nowhere/at-all"),
        (["export", "nowhere", "out2"], "expected a folder with adapter_config.json"),
        (["report", "nowhere"], "nowhere"),
        (["report", "recipe.yaml"], "expected a record.json, got something else"),
        (["run", "recipe.yaml", "output=/proc/foo"], "/proc/foo: could not be"),
        (
            ["evaluate", "recipe.yaml", "--adapter", "nowhere"],
            "expected a folder with adapter_config.json",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("forgetless: ")
    assert message in last


def test_ctrl_c_says_how_to_go_on_and_ends_with_130(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "train", stop)
    monkeypatch.setattr("sys.argv", ["forgetless", "run", "recipe.yaml"])
    assert status("run", recipe) == 130
    assert "forgetless run recipe.yaml" in capsys.readouterr().err


def test_methods_lists_all_with_paper_needs_and_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("methods") == 0
    out = capsys.readouterr().out
    for word in ("lora-null", "sc-lora", "2503.02659", "2505.23724", "preserve data", "promise"):
        assert word in out
    assert "trains: b | both (b)" in out
    assert "default_weight_decay" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_methods_as_json_can_be_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("methods", "--json") == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert {entry["name"] for entry in found} == set(ALL_METHODS)
    for entry in found:
        made = make_any_method({"name": entry["name"]} | entry["options"])
        assert made.default_learning_rate == entry["learning_rate"]


def test_the_schema_knows_every_key_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    resolved = load_recipe(Path(__file__).parents[2] / "recipes" / "gsm8k.yaml").resolved()
    assert set(schema["properties"]) == set(resolved)
    training = schema["$defs"]["TrainingRecipe"]["properties"]
    assert set(training) == set(resolved["training"])


def test_a_new_recipe_is_written_and_described(
    recipe: Path, tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("new", "mine.yaml", "--train", "data/train.jsonl", "--model", "model") == 0
    assert "forgetless run mine.yaml" in capsys.readouterr().out
    assert load_recipe(tmp_path / "mine.yaml").output == Path("runs/mine")
    assert status("new", "mine.yaml", "--train", "data/train.jsonl") == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert status("inspect", tiny_model_path) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^architecture +LlamaForCausalLM$", shown, re.MULTILINE)


@pytest.mark.parametrize("verb", [[], *([name] for name in VERBS)], ids=lambda verb: " ".join(verb))
def test_help_teaches_within_80_columns(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert status(*verb, "--help") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\b" not in out
    if verb:
        assert f"Examples:\n    forgetless {verb[0]}" in out
    else:
        for text in ("--install-completion", "Exit status:", "130", "NO_COLOR"):
            assert text in out
        commands = out.split("Commands:")[1]
        assert [line.split()[0] for line in commands.splitlines()[1 : len(VERBS) + 1]] == [*VERBS]
        assert "..." not in commands  # no description is cut off


def test_levels_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    def log(level: Level) -> str:
        file = io.StringIO()
        console = Console(file=file, width=80, force_terminal=True, highlight=False)
        progress = TerminalProgress(console, level)
        with progress.phase("data"):
            progress.note("a note")
            progress.warn("a warning")
        return file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[33m" in log("quiet")
    monkeypatch.setenv("NO_COLOR", "1")
    assert log("quiet") == "  warning: a warning\n"
    lines = log("verbose").splitlines()
    assert re.fullmatch(r"  \d\d:\d\d:\d\d data begins", lines[0])
    assert re.fullmatch(r"  \d\d:\d\d:\d\d a note", lines[1])
    assert re.fullmatch(r"  data +\d\.\d s", lines[3])
    assert "\x1b" not in "".join(lines)
    assert "a note" in log("normal")


def test_quiet_and_verbose_are_one_choice(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("run", recipe, "-q", "-v") == 2
    assert "expected one of the two, got both" in capsys.readouterr().err


def test_the_shell_completes_verbs(tmp_path: Path) -> None:
    environment = os.environ | {
        "_FORGETLESS_COMPLETE": "complete_bash",
        "COMP_WORDS": "forgetless ins",
        "COMP_CWORD": "1",
    }
    program = "from forgetless.cli import app; app(prog_name='forgetless')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["inspect"]


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"]])
def test_a_reader_who_has_had_enough_ends_the_command_without_a_word(arguments: list[str]) -> None:
    """`forgetless methods | true`."""
    code = "import sys; from forgetless.__main__ import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_adapter_that_no_scale_reaches_is_refused_before_anything_is_measured(
    recipe: Path,
    tmp_path: Path,
    tiny_model_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(base, config).save_pretrained(str(tmp_path / "theirs"))
    monkeypatch.setattr("forgetless.experiments.measure_adapter.load_base", None)
    scales = "evaluation.scales=[0.5]"
    assert status("evaluate", recipe, scales, "--adapter", tmp_path / "theirs") == 2
    assert "evaluation.scales: expected an adapter that is its update" in capsys.readouterr().err
