"""Sweeps that are killed, run twice at once, or fail in part, end like one that is left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
from run_setup import write_data
from sweep_setup import Sweeps, assert_same_runs, finished, lines_of

from forgetless.experiments.sweep import SweepSpec, look_at, plan_sweep
from forgetless.experiments.sweep.estimate import cost_of

pytestmark = pytest.mark.slow

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory, make_tiny_tokenizer) -> Iterator[Sweeps]:
    from tiny_bases import tiny_base

    folder = tmp_path_factory.mktemp("sweeps")
    tiny_base("llama").save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    write_data(folder / "data")
    started = Sweeps(folder / "model", folder / "data", folder)
    yield started
    started.close()


@pytest.fixture(scope="module")
def unbroken(sweeps):
    """The sweep, left alone, and the seconds that it took on this machine."""
    assert sweeps.run("whole") == 0
    return sweeps.folder / "whole", sweeps.seconds


@pytest.fixture(scope="module")
def whole(unbroken):
    return unbroken[0]


def test_what_runs_share_is_made_once(sweeps, whole):
    assert len(finished(whole)) == 12
    counts = sweeps.counts("whole")
    assert counts["moments"] == 2  # of train data and of preserve data
    assert counts["base"] == 2  # one file for each evaluation item
    # Four of plain LoRA, which are drawn each time; one each of lora-null and sc-lora.
    assert counts["start"] == 4 + 1 + 1
    assert list(lines_of(whole, " done")) == [1] * 12


def test_a_sweep_killed_ten_times_ends_like_one_that_is_not(sweeps, unbroken):
    whole, seconds = unbroken
    draw = random.Random(20260301)
    broken = sweeps.folder / "broken"
    for kill in range(9):
        # A machine may be faster by now: whenever a run ends the sweep is killed, and at once where
        # few are left, so that there is always something to kill.
        after = draw.uniform(0.0, seconds / 12) if len(finished(broken)) < 9 else 0.0
        assert sweeps.run("broken", kill_after=after, kill_when_one_ends=True) == KILLED
        if kill == 4:
            assert sweeps.run("broken", order={"die_in_save": True}) == KILLED
    assert not list((broken / "work").glob("*.failed.json"))
    assert len(finished(broken)) < 12
    assert sweeps.run("broken") == 0
    assert_same_runs(whole, broken)
    before = {path: path.stat().st_mtime_ns for path in broken.glob("runs/*/record.json")}
    assert sweeps.run("broken") == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in broken.glob("runs/*/record.json")} == before


def test_two_sweeps_on_one_folder_do_each_run_once(sweeps, whole):
    both = sweeps.folder / "both"
    assert sweeps.run("both", order={"times": 2}, processes=1) == 0
    assert_same_runs(whole, both)
    assert list(lines_of(both, " done")) == [1] * 12
    assert sweeps.counts("both") == sweeps.counts("whole")


def test_a_run_that_crashes_is_told_and_others_go_on_and_the_next_time_it_is_tried_again(sweeps):
    crash = sweeps.folder / "crash"
    crash.write_text("")
    keys = {
        "grid": {"method": ["lora-null", "lora"], "method.rank": [4]},
        "runs": [{"method": "lora", "method.rank": 99}],  # wider than a layer
    }
    assert sweeps.run("failing", order={"crash": str(crash)}, **keys) == 0
    assert len(crash.read_text()) == 2  # tried again once
    spec = SweepSpec.model_validate(sweeps.order("failing", **keys)["sweep"])
    status = look_at(plan_sweep(spec))
    assert [one.state for one in status.runs] == ["failed", "done", "failed"]
    assert "its process was ended by SIGKILL" in status.runs[0].error
    assert "rank: expected at most" in status.runs[2].error
    assert sum(note.startswith("failed: ") for note in sweeps.notes) == 2
    assert sum("it is tried again" in note for note in sweeps.notes) == 1  # no mistake in the input
    assert "by the 1 finished run of this sweep" in cost_of(status).source

    crash.unlink()
    assert sweeps.run("failing", order={"crash": str(crash)}, **keys) == 0
    status = look_at(plan_sweep(spec))
    assert [one.state for one in status.runs] == ["done", "done", "failed"]


def test_ctrl_c_ends_all_processes_and_says_how_to_go_on(sweeps):
    keys = {"grid": {"method": ["lora"], "method.rank": [4], "seed": [0, 1]}}
    assert sweeps.run("stopped", kill_after=0.5, sent=signal.SIGINT, **keys) == 130
    assert "0 of 2 runs are done" in sweeps.notes[-1]
    assert "Go on with this command" in sweeps.notes[-1]
    assert_group_ends(sweeps.group)
    assert sweeps.run("stopped", **keys) == 0


def test_where_the_sweep_alone_is_killed_its_runs_end_too(sweeps):
    keys = {"grid": {"method": ["lora"], "method.rank": [4], "seed": [0, 1]}}
    assert sweeps.run("alone", kill_after=0.3, only_the_sweep=True, **keys) == KILLED
    assert_group_ends(sweeps.group)
    assert sweeps.run("alone", **keys) == 0


def test_a_sweep_with_other_items_measures_again_and_trains_nothing(sweeps):
    keys = {"grid": {"method": ["lora"], "method.rank": [4]}}
    assert sweeps.run("measured", **keys) == 0
    record = next((sweeps.folder / "measured/runs").glob("*/record.json"))
    before = json.loads(record.read_text())
    other = json.loads(json.dumps(sweeps.base))
    other["evaluation"]["retention"][0]["metrics"] = ["nll"]
    assert sweeps.run("measured", base=other, **keys) == 0
    after = json.loads(record.read_text())
    assert len(list(record.parents[1].iterdir())) == 1
    assert after["training"]["curve"] == before["training"]["curve"]
    assert list(after["evaluation"]["items"][1]["metrics"]) == ["nll"]


def assert_group_ends(group: int) -> None:
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes of group {group} go on")


def test_the_reason_of_an_earlier_attempt_is_not_told_again(sweeps):
    keys = {"grid": {"method": ["lora"], "method.rank": [4]}, "retries": 0}
    spec = SweepSpec.model_validate(sweeps.order("unwritable", **keys)["sweep"])
    files = plan_sweep(spec).runs[0].files
    files.log.mkdir(parents=True)  # a run cannot write there
    (sweeps.folder / "unwritable" / "sweep.yaml").write_text("")
    files.fail("the reason of last week", can_be_retried=False)
    assert sweeps.run("unwritable", **keys) == 0
    assert "IsADirectoryError" in look_at(plan_sweep(spec)).runs[0].error
    files.log.rmdir()
    assert sweeps.run("unwritable", **keys) == 0
    assert look_at(plan_sweep(spec)).runs[0].state == "done"
    assert files.failure() is None
