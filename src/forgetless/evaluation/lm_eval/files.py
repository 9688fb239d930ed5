"""Where the rows of a task of lm-eval come from: the user's files, and what a recipe depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from datasets import load_dataset

from forgetless.errors import RecipeError
from forgetless.evaluation.lm_eval.spec import LmEvalRecipe, LmEvalTask

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SHIPPED = Path(__file__).parent / "local_tasks"
_SPLITS = ("training_split", "validation_split", "test_split")
_ANSWER_IS_TEXT = frozenset({"gsm8k_local"})


def is_shipped(manager: TaskManager, name: str) -> bool:
    """Whether a task is one of those that come with forgetless."""
    path = manager.task_index[name].yaml_path
    return path is not None and path.parent == SHIPPED


def with_files(
    manager: TaskManager, wanted: LmEvalTask, folder: Path
) -> tuple[str, dict[str, Path]]:
    """Point a task at the user's data.

    Args:
        manager: An index that has the task.
        wanted: The recipe's entry.
        folder: Where a task file may be written.

    Returns:
        The task's name, or a file that includes the task's; and the data's files by split, as far
        as the recipe says.

    Raises:
        RecipeError: No such file, or a task that reads something else.
    """
    entry = manager.task_index[wanted.task]
    if wanted.data_files is None and not is_shipped(manager, wanted.task):
        return wanted.task, {}
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
        "dataset_kwargs": {"data_files": _texts_of(files)},
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
    return str(path), files


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


def check_rows(name: str, files: Mapping[str, Path]) -> None:
    """Refuse rows that a shipped task would score without a word although it cannot read them.

    Args:
        name: The task's.
        files: By split.

    Raises:
        RecipeError: The file, the row, and what was expected.
    """
    text = name in _ANSWER_IS_TEXT
    # As lm-eval reads them; its own reading takes what is made here.
    dataset = load_dataset("json", data_files=_texts_of(files))
    for split, path in files.items():
        for number, row in enumerate(dataset[split], start=1):
            question, answer = row.get("question"), row.get("answer")
            if not isinstance(question, str):
                _refuse_row(path, number, "`question` as text", question)
            if text and not isinstance(answer, str):
                _refuse_row(path, number, "`answer` as text", answer)
            listed = isinstance(answer, list) and all(isinstance(a, str) and a for a in answer)
            if not text and not (listed and answer):
                _refuse_row(path, number, "`answer` as a list of accepted texts", answer)


def _texts_of(files: Mapping[str, Path]) -> dict[str, str]:
    return {split: str(path.expanduser().resolve()) for split, path in files.items()}


def _refuse_row(path: Path, number: int, expected: str, found: object) -> None:
    raise RecipeError(
        f"{path}, row {number}: expected {expected}, got "
        f"{'none' if found is None else repr(found)[:80]}; mend the file"
    )


def task_files(settings: LmEvalRecipe | None) -> Sequence[Path]:
    """Files and folders that the figures depend on.

    Those that the recipe names, and those that a task's own file names: what the folder of tasks
    includes from outside, and data on this machine.
    """
    if settings is None:
        return ()
    found: list[Path] = []
    seen: set[Path] = set()
    for task in settings.tasks:
        if isinstance(task.data_files, Path):
            found.append(task.data_files)
        elif task.data_files is not None:
            found += task.data_files.values()
        else:
            found += _named_files(SHIPPED / f"{task.task}.yaml", seen)
    if settings.include_path is not None:
        found.append(settings.include_path)
        for file in sorted(settings.include_path.expanduser().rglob("*.yaml")):
            found += _named_files(file, seen)
    # What lies in the folder is in it already; task files of packages are as their versions say.
    folders = [SHIPPED.resolve(), *_package()]
    if settings.include_path is not None:
        folders.append(settings.include_path.expanduser().resolve())
    return [
        path
        for path in dict.fromkeys(found)
        if path == settings.include_path
        or not any(path.expanduser().resolve().is_relative_to(folder) for folder in folders)
    ]


def _package() -> list[Path]:
    found = find_spec("lm_eval")
    return [Path(found.origin).resolve().parent] if found is not None and found.origin else []


class _AnyTag(yaml.SafeLoader):
    """Reads task files for the paths in them; functions are nothing here."""


_AnyTag.add_multi_constructor("", lambda loader, suffix, node: None)


def _named_files(path: Path, seen: set[Path]) -> Iterator[Path]:
    """A task file, what it includes, and the data on this machine that they name."""
    path = path.resolve()
    if path in seen or not path.is_file():
        return
    seen.add(path)
    yield path
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _AnyTag)
    except (ValueError, yaml.YAMLError):  # it is refused by name when it is opened
        return
    if not isinstance(config, dict):
        return
    includes = config.get("include") or []
    for name in includes if isinstance(includes, list) else [includes]:
        yield from _named_files(path.parent / str(name), seen)
    yield from _data_files(config)


def _data_files(config: Mapping[str, Any]) -> Iterator[Path]:
    options = config.get("dataset_kwargs")
    if isinstance(options, dict):
        for key in ("data_files", "data_dir"):
            for text in _texts(options.get(key)):
                yield from map(Path, sorted(glob(text)))  # noqa: PTH207  takes absolute ones
    members = config.get("task")
    for child in members if isinstance(members, list) else ():
        if isinstance(child, dict):
            yield from _data_files(child)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child)
