"""A sweep on a Ray cluster of this machine ends like one in processes of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from run_setup import write_data
from sweep_setup import Sweeps, assert_same_runs

from forgetless.errors import ForgetlessError
from forgetless.experiments.sweep import SweepSpec
from forgetless.experiments.sweep.ray_cluster import RayCluster

pytestmark = pytest.mark.slow

RAY = {"executor": "ray", "ray": {"cpus": 1}}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory, make_tiny_tokenizer) -> Iterator[Sweeps]:
    from tiny_bases import tiny_base

    folder = tmp_path_factory.mktemp("ray_sweeps")
    tiny_base("llama").save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    write_data(folder / "data")
    started = Sweeps(folder / "model", folder / "data", folder)
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(sweeps):
    """The sweep in local processes."""
    assert sweeps.run("whole") == 0
    return sweeps.folder / "whole"


def test_a_cluster_does_the_same_runs_bit_for_bit(sweeps, whole):
    pytest.importorskip("ray")
    assert sweeps.run("cluster", **RAY) == 0
    assert_same_runs(whole, sweeps.folder / "cluster")


def test_a_worker_that_is_killed_is_tried_again_and_the_result_is_the_same(sweeps, whole):
    pytest.importorskip("ray")
    killed: list[int] = []
    watcher = threading.Thread(target=kill_one_worker, args=(sweeps, killed))
    watcher.start()
    assert sweeps.run("killed", **RAY) == 0
    watcher.join(30)
    assert killed
    assert_same_runs(whole, sweeps.folder / "killed")


def kill_one_worker(sweeps: Sweeps, killed: list[int]) -> None:
    """The first process that Ray has at a run, a moment after it has begun."""
    work = sweeps.folder / "killed" / "work"
    for _ in range(2400):
        if list(work.glob("*.progress.json")):
            for process in psutil.process_iter(["name", "cmdline"]):
                if "ray::_work" in " ".join(
                    [process.info["name"], *(process.info["cmdline"] or ())]
                ):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.05)


def spec(**ray) -> SweepSpec:
    return SweepSpec(base={}, grid={"seed": [0]}, output="none", executor="ray", ray=ray)


def test_a_cluster_that_is_too_small_or_not_there_is_one_line(monkeypatch):
    ray = pytest.importorskip("ray")
    with pytest.raises(ForgetlessError, match=r"expected a cluster at 127\.0\.0\.1:1, got"):
        RayCluster(spec(address="127.0.0.1:1"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ForgetlessError, match="expected a cluster with 1 CPU, 1 GPU for a run"):
        RayCluster(spec(gpus=1))


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ForgetlessError, match=r"pip install 'forgetless\[ray\]'"):
        RayCluster(spec())
