"""`forgetless report` on many runs: folders of runs, tables for paper and spreadsheet, JSON."""

from __future__ import annotations

import csv
import io
import json

import pytest

from compare_records import World
from forgetless.cli import main
from forgetless.experiments.record import save_record

ARMS = {"lora": {"scaled": True}, "lora-null": {"method": "lora-null", "factor": 0.1}}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    for place, record in enumerate(World().records(ARMS, seeds=(0, 1))):
        save_record(record, folder / "runs" / f"run{place:02}" / "record.json")
    (folder / "runs" / "unfinished").mkdir()
    (folder / "runs" / "unfinished" / "recipe.yaml").write_text("")
    return folder


def status(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_a_sweeps_folder_is_one_comparison_in_words_of_80_columns(sweep, tmp_path, capsys):
    assert status("report", sweep, "--output", tmp_path / "all.html") == 0
    shown, noted = capsys.readouterr()
    assert "unfinished: no record yet" in " ".join(noted.split())
    assert "lora-null kept more than plain LoRA at the same gain" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if "/" not in line)
    assert (tmp_path / "all.html").is_file()
    runs = sorted((sweep / "runs").glob("run*"))
    assert status("report", *runs, "--output", tmp_path / "again.html") == 0
    again, noted = capsys.readouterr()
    assert again.splitlines()[:20] == shown.splitlines()[:20]
    assert not noted


def test_tables_hold_every_figure_and_no_report_is_written(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status("report", sweep, "--table", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    # Four rates of two methods, plain LoRA at three more scales, with a gain and a loss each.
    assert len(rows) == (8 + 12) * 2
    assert {row["seeds"] for row in rows} == {"2"}
    assert status("report", sweep, "--table", "markdown") == 0
    shown = capsys.readouterr().out
    assert "| method | rate | seeds |" in shown
    assert shown.count("| lora-null |") == 3
    assert not list(tmp_path.iterdir())


def test_json_holds_the_comparison(sweep, tmp_path, capsys):
    assert status("report", sweep, "--output", tmp_path / "all.html", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    arms = {arm["name"]: arm for arm in found["comparison"]["arms"]}
    assert arms["lora-null"]["matched"][0]["outcome"] == "kept more"


def test_a_folder_without_records_and_two_runs_of_one_cell_are_one_line(sweep, tmp_path, capsys):
    assert status("report", tmp_path) == 2
    assert "expected the folder of a finished run, of several, or of a sweep" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert status("report", sweep, sweep / "runs" / "run00", "--output", tmp_path / "x.html") == 0
    capsys.readouterr()
    save_record(World(draw=1).one("lora", 2e-4, 0), tmp_path / "other" / "record.json")
    assert status("report", sweep, tmp_path / "other", "--output", tmp_path / "x.html") == 2
    assert "expected one record of lora at rate 0.0002 with seed 0, got two" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_what_cannot_be_compared_has_its_figures_all_the_same(sweep, tmp_path, capsys):
    other = World().one("other", 1e-3, 0)
    model = other.model.model_copy(update={"fingerprint": "other"})
    save_record(other.model_copy(update={"model": model}), tmp_path / "other" / "record.json")
    assert status("report", sweep, tmp_path / "other", "--table", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len({row["run"] for row in rows}) == 17
    assert status("report", sweep, tmp_path / "other", "--output", tmp_path / "x.html") == 0
    assert "cannot be compared" in capsys.readouterr().out


def test_a_damaged_record_in_a_folder_is_left_out_aloud(tmp_path, capsys):
    for place, record in enumerate(World().records(ARMS, seeds=(0,))):
        save_record(record, tmp_path / "runs" / f"run{place}" / "record.json")
    (tmp_path / "runs" / "run3" / "record.json").write_text('{"a":')
    assert status("report", tmp_path, "--output", tmp_path / "x.html") == 0
    assert "run3/record.json" in "".join(capsys.readouterr().err.split())
    assert status("report", tmp_path / "runs" / "run3", "--output", tmp_path / "x.html") == 2
