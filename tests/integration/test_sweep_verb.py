"""`forgetless sweep` on the command line: plan, result, mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from run_setup import write_data
from sweep_setup import base_of

from forgetless.cli import main
from forgetless.experiments.sweep import SweepSpec


def status(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def spec(tiny_model_path, tmp_path, monkeypatch) -> Path:
    """Two runs of one step each, in files of a user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "data")
    base = base_of(tiny_model_path, tmp_path / "data")
    base["training"] |= {"max_steps": 1, "save_steps": 1}
    Path("base.yaml").write_text(yaml.safe_dump(base))
    tree = {
        "base": "base.yaml",
        "grid": {"method": ["lora"], "method.rank": [4], "seed": [0, 1]},
        "output": "sweeps/first",
        "threads": 1,
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(tree))
    return Path("sweep.yaml")


def one_line(capsys) -> str:
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return " ".join(shown.err.split())


def test_a_dry_run_shows_plan_and_cost_and_writes_nothing(spec, capsys):
    assert status("sweep", spec, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "lora, rank 4, seed 1" in shown
    assert "2 runs, 2 steps" in shown
    assert not Path("sweeps").exists()
    assert status("sweep", spec, "--dry-run", "--json", "grid.seed=[0, 1, 2]") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"waiting": 3}
    assert found["cost"]["steps"] == 3
    assert found["shared"]["bases"] == 1


def test_a_sweep_runs_and_the_next_time_has_nothing_to_do(spec, capsys):
    assert status("sweep", spec, "--processes", "2") == 0
    shown = capsys.readouterr()
    assert "2 of 2 done" in shown.out
    assert "forgetless report sweeps/first" in shown.out
    records = sorted(Path("sweeps/first/runs").glob("*/record.json"))
    before = [path.stat().st_mtime_ns for path in records]
    assert len(before) == 2
    assert status("sweep", spec, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"done": 2}
    assert [path.stat().st_mtime_ns for path in records] == before
    assert status("report", "sweeps/first", "--output", "both.html") == 0
    assert "2 seeds" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["grids.seed=[1]"], "grids"),
        (["grid.seed=[]"], "grid.seed: expected a list of values, got an empty one"),
        (["grid.method.rank=[0]"], "cell method lora, method.rank 0"),
        (["grid.method=[nothing]"], "cell method nothing"),
        (["seed=3"], "expected a key that the sweep does not set itself, got seed"),
        (["--executor", "slurm"], "executor"),
        (["--processes", "0"], "processes"),
        (["output=base.yaml"], "output base.yaml: expected a folder, got a file"),
        (["train_data.0.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["--quiet", "--verbose"], "expected one of the two, got both"),
    ],
)
def test_a_mistake_is_one_line(spec, capsys, arguments, expected):
    assert status("sweep", spec, *arguments) == 2
    assert expected in one_line(capsys)
    assert not Path("sweeps").exists()


def test_a_failed_run_is_told_with_its_log_and_the_others_go_on(spec, capsys):
    assert status("sweep", spec, "-q", "grid.method.rank=[4, 99]", "grid.seed=[0]") == 2
    shown = capsys.readouterr()
    assert "1 of 2 done, 1 failed" in shown.out
    assert "rank: expected at most" in " ".join(shown.out.split())
    assert "The same command tries them again." in shown.out


def test_the_schema_knows_every_key_of_a_sweep(capsys):
    assert status("schema", "sweep") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["properties"]) == set(SweepSpec.model_fields)
