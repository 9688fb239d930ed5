"""Names in a recipe → tasks of lm-eval with their data, or one line on what is wrong with them."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from forgetless.errors import RecipeError
from forgetless.evaluation.lm_eval.code import (
    refuse_running_answers,
    refuse_task_code,
    sandboxed_templates,
)
from forgetless.evaluation.lm_eval.spec import LmEvalRecipe, LmEvalTask
from forgetless.evaluation.lm_eval.told import told
from forgetless.models.state import random_state_kept

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SHIPPED = Path(__file__).parent / "local_tasks"
_SPLITS = ("training_split", "validation_split", "test_split")


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


def open_tasks(settings: LmEvalRecipe, *, allow_code: bool = False) -> list[OpenTask]:
    """Find the tasks, refuse code, and read their data.

    Args:
        settings: What the recipe asks for.
        allow_code: Whether a folder of the user's own tasks may run Python.

    Raises:
        RecipeError: lm-eval is not installed, no such task, code that is not allowed, or data that
            cannot be read.
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
        local = TaskManager(include_path=list(folders), include_defaults=False)
        return [
            one
            for wanted in settings.tasks
            for one in _open(_manager(local, folders, wanted.task), wanted)
        ]


@contextlib.contextmanager
def harness_quiet() -> Iterator[None]:
    """Inside the block, log lines and bars of lm-eval and of its libraries are dropped.

    Some of its bars have no switch: they write to standard error, which is a sink here.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
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
        return TaskManager(include_path=list(folders))
    if name in _defaults().task_index:
        return _defaults()
    near = difflib.get_close_matches(name, [*local.all_tasks, *_defaults().all_tasks], n=3)
    remedy = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
    raise RecipeError(f"lm_eval: expected a task of lm-eval, got {name!r}; {remedy}")


def _open(manager: TaskManager, wanted: LmEvalTask) -> list[OpenTask]:
    for name in _leaves(manager, wanted.task):
        refuse_running_answers(name, manager.task_index[name].cfg or {})
    with told(wanted.task):
        with tempfile.TemporaryDirectory() as folder:
            spec = _with_files(manager, wanted, Path(folder))
            loaded = manager.load([spec])
        parts = list(loaded["tasks"].values())
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
        return [OpenTask(wanted, wanted.label, str(parts[0].VERSION), tuple(parts))]
    weighted = group is not None and group.aggregate_metric_list
    if weighted and all(m.weight_by_size for m in group.aggregate_metric_list):
        return [OpenTask(wanted, wanted.label, group.version, tuple(parts))]
    # A tag, or a group that lm-eval does not sum up in this way: a list of tasks.
    return [OpenTask(wanted, part.task_name, str(part.VERSION), (part,)) for part in parts]


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


def _with_files(manager: TaskManager, wanted: LmEvalTask, folder: Path) -> str:
    """The task's name, or a file that includes the task's and points at the user's data."""
    entry = manager.task_index[wanted.task]
    ours = entry.yaml_path is not None and entry.yaml_path.parent == SHIPPED
    if wanted.data_files is None and not ours:
        return wanted.task
    config = dict(entry.cfg or {})
    where = f"lm_eval task {wanted.label}"
    if entry.yaml_path is None or config.get("dataset_path") != "json":
        raise RecipeError(
            f"{where}: expected a task that reads JSON files for data_files, got one that reads "
            f"{config.get('dataset_path')}; leave data_files out"
        )
    named = [str(config[key]) for key in _SPLITS if config.get(key)]
    asked = str(config.get("test_split") or config.get("validation_split"))
    files = _files(wanted, config, asked, where)
    for split, path in files.items():
        if split not in named:
            raise RecipeError(
                f"{where}: expected data_files for {', '.join(named)}, got {split!r}; rename it"
            )
        if not path.expanduser().is_file():
            raise RecipeError(
                f"{where}: expected a file for {split}, got {path}, which is none; "
                "point data_files at your file"
            )
    shots = wanted.num_fewshot
    shots = (config.get("num_fewshot") or 0) if shots is None else shots
    source = _examples_from(config, asked)
    changes: dict[str, Any] = {
        "include": str(entry.yaml_path.resolve()),
        "dataset_kwargs": {
            "data_files": {split: str(p.expanduser().resolve()) for split, p in files.items()}
        },
    }
    changes |= {key: None for key in _SPLITS if config.get(key) and config[key] not in files}
    if source not in files:
        if shots:
            raise RecipeError(
                f"{where}: expected data_files for {source}, from which its {shots} examples come, "
                f"got those of {', '.join(files)}; add the file, or set num_fewshot to 0"
            )
        changes["fewshot_split"] = None
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(changes), encoding="utf-8")
    return str(path)


def _examples_from(config: Mapping[str, Any], asked: str) -> str:
    """The split that lm-eval draws examples from."""
    own = config.get("fewshot_config") or {}
    if own.get("samples"):
        return asked
    return str(
        own.get("split")
        or config.get("fewshot_split")
        or config.get("training_split")
        or config.get("validation_split")
        or asked
    )


def _files(
    wanted: LmEvalTask, config: Mapping[str, Any], asked: str, where: str
) -> dict[str, Path]:
    """Files by split: what was given, or what the task's own file names."""
    given = wanted.data_files
    if isinstance(given, Path):
        return {asked: given}
    if given is None:
        own = (config.get("dataset_kwargs") or {}).get("data_files") or {}
        given = {split: Path(name) for split, name in own.items() if Path(name).is_file()}
    if asked not in given:
        raise RecipeError(
            f"{where}: expected data_files for {asked}, the rows that are asked, got "
            f"{', '.join(given) or 'none'}; write `data_files: {{{asked}: your.jsonl}}`"
        )
    return dict(given)


def task_files(settings: LmEvalRecipe | None) -> Sequence[Path]:
    """Files and folders that the figures depend on, as far as the recipe names them."""
    if settings is None:
        return ()
    found = [settings.include_path] if settings.include_path is not None else []
    for task in settings.tasks:
        if isinstance(task.data_files, Path):
            found.append(task.data_files)
        elif task.data_files is not None:
            found += task.data_files.values()
    return found
