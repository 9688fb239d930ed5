"""`sweep`: all runs of a plan, one after another or side by side, until none is left to do."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetless.experiments.output import plain_recipe
from forgetless.experiments.record import Record
from forgetless.experiments.sweep.executors import Ended, Executor
from forgetless.experiments.sweep.folder import FinishedRuns, State
from forgetless.experiments.sweep.local import LocalProcesses, visible_gpus
from forgetless.experiments.sweep.plan import Plan, PlannedRun, plan_sweep, resolved
from forgetless.experiments.sweep.spec import SweepSpec
from forgetless.experiments.sweep.work import Job

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass
class RunStatus:
    """Where one run is.

    Attributes:
        run: As planned.
        state: `done`, `running`, `failed` or `waiting`.
        error: Why it failed, in one line.
        progress: What it last told, while it runs.
        is_elsewhere: Whether another sweep is at it.
        seconds: Of all its attempts, where it is done.
        was_done: Whether it was when the sweep began.
    """

    run: PlannedRun
    state: State = "waiting"
    error: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    is_elsewhere: bool = False
    seconds: float = 0.0
    was_done: bool = False


@dataclass
class SweepStatus:
    """Where a sweep is: all its runs, and how many it takes at a time."""

    plan: Plan
    runs: list[RunStatus]
    slots: int = 1

    def count(self) -> Counter[State]:
        """How many runs are in each state."""
        return Counter(run.state for run in self.runs)


class SweepProgress:
    """Hears of a sweep. This one says nothing; override what you show."""

    def look(self, status: SweepStatus) -> None:
        """See where it is: several times a second, and once at the end."""

    def note(self, text: str) -> None:
        """Pass on a line that a user wants to know."""

    def command(self, line: str) -> None:
        """Pass on a command for a shell, to be shown so that it can be pasted as it stands."""


def look_at(plan: Plan, finished: FinishedRuns | None = None) -> SweepStatus:
    """Where a sweep is, by what lies in its folder; nothing is started."""
    known = finished or FinishedRuns()
    # What a cluster has room for is not known before it is asked.
    slots = _local(plan).slots if plan.spec.executor == "local" else plan.spec.processes
    status = SweepStatus(plan, [RunStatus(run) for run in plan.runs], slots)
    for one in status.runs:
        record = known.record(one.run.files, one.run.recipe)
        if record is not None:
            one.state, one.seconds, one.was_done = "done", _seconds(record), True
        elif one.run.files.is_taken():
            one.state, one.is_elsewhere = "running", True
            one.progress = one.run.files.progress_now()
        elif failure := one.run.files.failure():
            one.state, one.error = "failed", str(failure.get("error", ""))
    return status


def sweep(
    spec: SweepSpec,
    *,
    progress: SweepProgress | None = None,
    resume: str | None = None,
    allow_task_code: bool = False,
) -> SweepStatus:
    """Do all runs that are not done yet; each is an ordinary run folder in `output/runs`.

    Called again, it goes on. A second sweep on the same folder, also on another machine, takes what
    no other is at.

    Args:
        spec: From `load_sweep`.
        progress: Hears of it; silent by default.
        resume: Command that does the same again, told to the user on Ctrl-C.
        allow_task_code: Whether folders of lm-eval tasks may run Python.

    Returns:
        Every run with its state, `done` or `failed`; failed ones have the reason. What failed
        before is tried again.

    Raises:
        ForgetlessError: A cell that is no recipe, data that cannot be used, a folder of something
            else. A run that fails raises nothing: the others go on.
    """
    plan = plan_sweep(spec, allow_task_code=allow_task_code)
    plan.folder.claim(resolved(plan))
    heard = progress or SweepProgress()
    drive = _Drive(plan, heard, allow_task_code=allow_task_code)
    try:
        return drive.go()
    except KeyboardInterrupt:
        done = drive.status.count()["done"]
        heard.note(
            f"stopped; {done} of {len(plan.runs)} runs are done, and what the others have saved is "
            f"kept. Go on with {'this command:' if resume else 'the same command'}"
        )
        if resume:
            heard.command(resume)
        raise
    finally:
        drive.executor.stop()


class _Drive:
    """One sweep while it goes on."""

    def __init__(self, plan: Plan, heard: SweepProgress, *, allow_task_code: bool) -> None:
        self.heard = heard
        self.allow_task_code = allow_task_code
        self.finished = FinishedRuns()
        self.status = look_at(plan, self.finished)
        for one in self.status.runs:
            if one.state == "failed":
                one.state, one.error = "waiting", ""
        self.executor = _executor(plan)
        self.status.slots = self.executor.slots
        self.of = {one.run.name: one for one in self.status.runs}
        self.mine: set[str] = set()
        self.tries: Counter[str] = Counter()

    def go(self) -> SweepStatus:
        while any(one.state in ("waiting", "running") for one in self.status.runs):
            self._start()
            begun = time.monotonic()
            for ended in self.executor.ended(_SECONDS_BETWEEN_LOOKS):
                self._settle(ended)
            self._look()
            self.heard.look(self.status)
            # An executor with nothing to wait for comes back at once.
            if not self.mine:
                time.sleep(max(0.0, _SECONDS_BETWEEN_LOOKS - (time.monotonic() - begun)))
        self.heard.look(self.status)
        return self.status

    def _start(self) -> None:
        for one in self.status.runs:
            if len(self.mine) >= self.executor.slots:
                return
            if one.state != "waiting":
                continue
            if self._is_done(one):  # by another sweep, since
                continue
            if one.run.files.is_taken():
                one.state, one.is_elsewhere = "running", True
                continue
            one.state, one.is_elsewhere = "running", False
            self.mine.add(one.run.name)
            self.tries[one.run.name] += 1
            self.executor.start(self._job(one.run))

    def _job(self, run: PlannedRun) -> Job:
        return Job(
            name=run.name,
            recipe=plain_recipe(run.recipe),
            sweep=str(self.status.plan.folder.path.absolute()),
            directory=str(Path.cwd()),
            environment={},
            threads=self.status.plan.spec.threads,
            allow_task_code=self.allow_task_code,
        )

    def _settle(self, ended: Ended) -> None:
        """What became of a run whose process has ended: its files tell."""
        one = self.of[ended.name]
        self.mine.discard(ended.name)
        one.progress = {}
        if ended.how == "taken":
            self.tries[ended.name] -= 1
            one.state, one.is_elsewhere = "running", True
            return
        if self._is_done(one):
            return
        if ended.how not in ("done", "failed"):
            one.run.files.fail(
                f"{ended.how}; its log: {one.run.files.log}", can_be_retried=not ended.is_final
            )
        failure = one.run.files.failure() or {
            "error": f"{one.run.files.record}: expected a record that stands for the run, got none",
            "can_be_retried": True,
        }
        one.error = str(failure.get("error", ""))
        if (
            failure.get("can_be_retried")
            and self.tries[ended.name] <= self.status.plan.spec.retries
        ):
            self.heard.note(f"{one.run.label}: {one.error}; it is tried again")
            one.state = "waiting"
        else:
            self.heard.note(f"failed: {one.run.label}: {one.error}")
            one.state = "failed"

    def _look(self) -> None:
        for one in self.status.runs:
            if one.state != "running":
                continue
            one.progress = one.run.files.progress_now() or one.progress
            if one.is_elsewhere and not one.run.files.is_taken():
                one.state, one.is_elsewhere, one.progress = "waiting", False, {}

    def _is_done(self, one: RunStatus) -> bool:
        record = self.finished.record(one.run.files, one.run.recipe)
        if record is not None:
            one.state, one.seconds, one.error = "done", _seconds(record), ""
        return record is not None


def _executor(plan: Plan) -> Executor:
    spec = plan.spec
    if spec.executor == "ray":
        from forgetless.experiments.sweep.ray_cluster import RayCluster

        return RayCluster(spec)
    return _local(plan)


def _local(plan: Plan) -> LocalProcesses:
    on_any = all(run.recipe.device == "auto" for run in plan.runs)
    return LocalProcesses(
        plan.folder.work / "server.log",
        plan.spec.processes,
        gpus=visible_gpus() if on_any else (),
        threads=plan.spec.threads,
    )


def _seconds(record: Record) -> float:
    return sum(record.phases.values())
