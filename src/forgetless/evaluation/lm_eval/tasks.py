"""Names in a recipe → tasks of lm-eval with their data, or one line on what is wrong with them."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.errors import RecipeError
from forgetless.evaluation.lm_eval.code import (
    refuse_running_answers,
    refuse_task_code,
    sandboxed_templates,
)
from forgetless.evaluation.lm_eval.files import SHIPPED, check_rows, is_shipped, with_files
from forgetless.evaluation.lm_eval.spec import LmEvalRecipe, LmEvalTask
from forgetless.evaluation.lm_eval.told import told
from forgetless.models.state import random_state_kept

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class OpenTask:
    """What stands under one name in the record.

    Attributes:
        wanted: The recipe's entry.
        label: Name of the item.
        version: Of the task or group, as its file says.
        parts: Tasks of lm-eval: one, or all of a group that is a mean over all their rows.
    """

    wanted: LmEvalTask
    label: str
    version: str
    parts: tuple[Any, ...]


def open_tasks(
    settings: LmEvalRecipe, *, taken: Sequence[str] = (), allow_code: bool = False
) -> list[OpenTask]:
    """Find the tasks, refuse code, and read their data.

    Args:
        settings: What the recipe asks for.
        taken: Names of evaluation items, which tasks cannot have as well.
        allow_code: Whether a folder of the user's own tasks may run Python.

    Raises:
        RecipeError: lm-eval is not installed, no such task, code that is not allowed, data that
            cannot be read, or two tasks of one name.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(
            "lm_eval: expected the package lm-eval, got none; install it with "
            "`pip install 'forgetless[lm-eval]'`, or take lm_eval out of the recipe"
        )
    folder = settings.include_path
    if folder is not None:
        if not folder.expanduser().is_dir():
            raise RecipeError(
                f"lm_eval.include_path: expected a folder of task files, got {folder}; check it"
            )
        if not allow_code:
            refuse_task_code(folder.expanduser())
    for wanted in settings.tasks:
        refuse_running_answers(wanted.task, {})
    from lm_eval.tasks import TaskManager

    folders = [SHIPPED, *([folder.expanduser()] if folder is not None else [])]
    with harness_quiet(), sandboxed_templates(), random_state_kept():
        with told(f"the tasks in {folder}"):
            local = TaskManager(include_path=list(folders), include_defaults=False)
        opened = [
            one
            for wanted in settings.tasks
            for one in _open(_manager(local, folders, wanted.task), wanted)
        ]
    _refuse_one_name_twice(opened, taken)
    return opened


@contextlib.contextmanager
def harness_quiet() -> Iterator[None]:
    """Inside the block, log lines and bars of lm-eval and of its libraries are dropped.

    Some of its bars have no switch: they write to standard error, which is a sink here.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@cache
def _defaults() -> TaskManager:
    """The index of lm-eval's own tasks; it reads thousands of files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(local: TaskManager, folders: Sequence[Path], name: str) -> TaskManager:
    """The smallest index that has a task and, where it is a group, its members."""
    from lm_eval.tasks import TaskManager

    if name in local.all_subtasks:
        return local
    if name in local.task_index:
        members = (local.task_index[name].cfg or {}).get("task")
        if isinstance(members, list) and all(m in local.all_subtasks for m in members):
            return local
        return TaskManager(include_path=list(folders))
    if name in _defaults().task_index:
        return _defaults()
    near = difflib.get_close_matches(name, [*local.all_tasks, *_defaults().all_tasks], n=3)
    remedy = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
    raise RecipeError(f"lm_eval: expected a task of lm-eval, got {name!r}; {remedy}")


def _open(manager: TaskManager, wanted: LmEvalTask) -> list[OpenTask]:
    for name in _leaves(manager, wanted.task):
        refuse_running_answers(name, manager.task_index[name].cfg or {})
    with tempfile.TemporaryDirectory() as folder:
        spec, files = with_files(manager, wanted, Path(folder))
        with told(wanted.task, list(files.values())):
            if is_shipped(manager, wanted.task):
                check_rows(wanted.task, files)
            loaded = manager.load([spec])
    parts = list(loaded["tasks"].values())
    with told(wanted.task, list(files.values())):
        for part in parts:
            # Loaded, a task knows what its file includes.
            refuse_running_answers(part.task_name, part.dump_config())
            if wanted.num_fewshot is not None:
                part.set_config(key="num_fewshot", value=wanted.num_fewshot)
            elif part.get_config("num_fewshot") is None:
                part.set_config(key="num_fewshot", value=0)
            _check_examples(part)
    group = loaded.get("groups", {}).get(wanted.task)
    if group is None and len(parts) == 1:
        return [OpenTask(wanted, wanted.label, _version(parts[0]), tuple(parts))]
    if group is not None and _is_one_mean(group, parts):
        return [OpenTask(wanted, wanted.label, str(group.version or ""), tuple(parts))]
    # A tag, or a group that lm-eval does not sum up in this way: a list of tasks.
    label = f"{wanted.name}: " if wanted.name else ""
    return [OpenTask(wanted, label + part.task_name, _version(part), (part,)) for part in parts]


def _version(part: Any) -> str:
    from lm_eval.api.task import ConfigurableTask

    version = part.VERSION
    return "" if version is None or version == ConfigurableTask.VERSION else str(version)


def _is_one_mean(group: Any, parts: Sequence[Any]) -> bool:
    """Whether a group is a mean over the rows of all its tasks.

    A correlation of all rows, say, is not the mean of those of the tasks, which lm-eval gives.
    """
    from lm_eval.api.metrics import mean

    listed = group.aggregate_metric_list or ()
    return bool(listed) and all(
        [
            *(metric.weight_by_size for metric in listed),
            *(function is mean for part in parts for function in part.aggregation().values()),
        ]
    )


def _refuse_one_name_twice(opened: Sequence[OpenTask], taken: Sequence[str]) -> None:
    """Figures stand under names; tags and groups give theirs only now."""
    seen = set(taken)
    for one in opened:
        if one.label in seen:
            raise RecipeError(
                f"lm_eval: expected a name for each task and item, got {one.label!r} twice, the "
                f"second from {one.wanted.task}; give that entry a `name`"
            )
        seen.add(one.label)


def _check_examples(part: Any) -> None:
    """Refuse more examples than there are rows to draw them from."""
    from lm_eval.api.task import ConfigurableTask

    shots = part.get_config("num_fewshot")
    if not shots or not isinstance(part, ConfigurableTask):
        return
    # One more is drawn where the question can be among them, which lm-eval sees by the split.
    drawn = shots + (part.fewshot_cfg.split == part.config.test_split)
    rows = len(part.fewshot_docs() or ())
    if rows < drawn:
        raise RecipeError(
            f"lm_eval task {part.task_name}: expected at least {drawn} rows to draw {shots} "
            f"examples from, got {rows}; lower num_fewshot, or add rows"
        )


def _leaves(manager: TaskManager, name: str, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Names of the tasks behind a task, tag or group, read from the index alone."""
    entry = manager.task_index.get(name)
    if entry is None or name in seen:
        return
    if name in manager.all_subtasks:
        yield name
        return
    members = entry.tags if name in manager.all_tags else (entry.cfg or {}).get("task") or ()
    for member in [members] if isinstance(members, str) else members:
        child = member if isinstance(member, str) else member.get("task") or member.get("group")
        for part in child if isinstance(child, list) else [child]:
            yield from _leaves(manager, str(part), seen | {name})
