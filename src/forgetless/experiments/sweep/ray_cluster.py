"""A Ray cluster: one run a task; Ray places them, and tries again where a machine is lost.

All machines must see the sweep's folder and the data under the same paths. Ray is imported where a
cluster is asked for, and not before.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from forgetless.errors import ForgetlessError
from forgetless.experiments.sweep.executors import Ended
from forgetless.experiments.sweep.spec import SweepSpec
from forgetless.experiments.sweep.work import Job, work

_SECONDS_TO_ANSWER = 10.0
# What runs on other machines must see as this process does.
_CARRIED = ("FORGETLESS_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


class RayCluster:
    """Runs as Ray tasks, each in a worker process that ends with it and gives its GPU free."""

    def __init__(self, spec: SweepSpec) -> None:
        """Connect to the cluster, or start one on this machine where there is none.

        Raises:
            ForgetlessError: Ray is not installed, or no cluster is there.
        """
        try:
            import ray
        except ImportError as error:
            raise ForgetlessError(
                "executor ray: expected the package ray, got none; pip install 'forgetless[ray]', "
                "or take executor: local"
            ) from error
        self._ray = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _check_reachable(spec.ray.address or os.environ.get("RAY_ADDRESS"))
            try:
                ray.init(address=spec.ray.address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = (str(error).splitlines() or [""])[0]
                raise ForgetlessError(
                    f"executor ray: expected a cluster at {spec.ray.address or 'RAY_ADDRESS'}, "
                    f"got: {reason}; look at `ray status`, or take executor: local"
                ) from error
        has = ray.cluster_resources()
        self._cpus = spec.ray.cpus or spec.threads or 1
        self._gpus = spec.ray.gpus if spec.ray.gpus is not None else min(has.get("GPU", 0.0), 1.0)
        self.slots = _slots(has, {"CPU": self._cpus, "GPU": self._gpus})
        self._threads = spec.threads or max(int(self._cpus), 1)
        self._task = ray.remote(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_retries=spec.retries,  # of machines and processes that are lost, not of errors
            max_calls=1,
            runtime_env={"env_vars": {k: os.environ[k] for k in _CARRIED if k in os.environ}},
        )(_work)
        self._going: dict[Any, str] = {}

    def start(self, job: Job) -> None:
        """Hand a run to the cluster."""
        line = Job.as_json(job)
        self._going[self._task.remote(line, self._threads)] = job.name

    def ended(self, seconds: float) -> list[Ended]:
        """Tasks that have ended."""
        if not self._going:
            return []
        ready, _ = self._ray.wait(list(self._going), num_returns=1, timeout=seconds)
        found = []
        for task in ready:
            name = self._going.pop(task)
            try:
                found.append(Ended(name, self._ray.get(task)))
            except self._ray.exceptions.RayError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                found.append(Ended(name, f"Ray lost it: {reason}", is_final=True))
        return found

    def stop(self) -> None:
        """Cancel what is going on; shut down a cluster that was started here."""
        for task in self._going:
            self._ray.cancel(task, force=True)
        self._going.clear()
        if self._is_ours:
            self._ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Refuse an address where nothing answers: Ray itself would try for minutes.

    Raises:
        ForgetlessError: Nothing listens there.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # `auto`, `local`, or none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise ForgetlessError(
            f"executor ray: expected a cluster at {address}, got: {error.strerror or error}; look "
            "at `ray status`, or take executor: local"
        ) from error


def _work(line: str, threads: int) -> str:
    """In a worker, which ends with it."""
    from dataclasses import replace

    job = Job.from_json(line)
    return work(replace(job, threads=job.threads or threads))


def _slots(has: dict[str, float], each: dict[str, float]) -> int:
    """How many runs the cluster holds at a time."""
    room = [int(has.get(kind, 0.0) / need) for kind, need in each.items() if need > 0]
    if min(room) < 1:
        asked = ", ".join(f"{need:g} {kind}" for kind, need in each.items() if need > 0)
        there = ", ".join(f"{has.get(kind, 0.0):g} {kind}" for kind in each)
        raise ForgetlessError(
            f"executor ray: expected a cluster with {asked} for a run, got one with {there}; lower "
            "ray.cpus, ray.gpus or threads"
        )
    return min(room)
