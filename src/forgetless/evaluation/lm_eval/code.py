"""Which task files of lm-eval run code: found by reading them, without importing anything.

A task file can name Python functions (`!function`) and metrics that the library `evaluate` would
fetch and run; pickled data run code as they are read. Jinja templates run in a sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from forgetless.errors import RecipeError

# What a YAML file without code is made of.
_PLAIN = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in (
        *("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge", "value"),
        *("binary", "set", "omap", "pairs"),
    )
)
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")
# Their metrics run what the model wrote; not all of their files say `unsafe_code`.
_RUN_ANSWERS = frozenset({"code_eval", "pass_at_k", "pass@1"})
_RUN_ANSWERS_NAMES = ("humaneval", "mbpp", "cruxeval")


def refuse_task_code(folder: Path) -> None:
    """Refuse a folder of tasks that would run code of its own.

    Raises:
        RecipeError: Names the file, and `--allow-task-code`.
    """
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".py":
            _refuse(path, "Python code")
        if path.suffix in (".yaml", ".yml"):
            _check_file(path, set())


def refuse_running_answers(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a task that executes what the model wrote; no flag allows it.

    Args:
        name: The task's.
        config: Its file as read, functions as text.

    Raises:
        RecipeError: Always off here.
    """
    metrics = {str(entry.get("metric")) for entry in _metric_list(name, config)}
    marked = config.get("unsafe_code", False) is not False  # as lm-eval asks: 0 marks it, too
    named = name.lower().startswith(_RUN_ANSWERS_NAMES)
    if marked or named or any(_runs_answers(metric) for metric in metrics):
        raise RecipeError(
            f"lm_eval: expected tasks that only read what the model writes, got {name}, which "
            "executes it; leave it out, and run it with lm-eval itself in a sandbox of yours"
        )


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Inside the block, the templates of task files cannot reach Python.

    lm-eval renders them in a plain environment, in which `{{ ''.__class__ }}` is a way out of the
    template; it takes no other one from outside, so that it is exchanged for the time of a run.
    """
    import lm_eval.utils

    plain = lm_eval.utils.env
    sandbox = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True
    )
    sandbox.filters |= plain.filters
    lm_eval.utils.env = sandbox
    try:
        yield
    finally:
        lm_eval.utils.env = plain


def _runs_answers(metric: str) -> bool:
    return metric in _RUN_ANSWERS or metric.rpartition(".")[2] in _RUN_ANSWERS


def _check_file(path: Path, seen: set[Path]) -> None:
    """One file, and all that it includes from wherever.

    As lm-eval does, a link is followed before the folder is asked that includes are relative to.
    """
    path = path.resolve()
    if path in seen:
        return
    seen.add(path)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{path}: expected a task file in YAML, got: {str(error).splitlines()[0]}; mend it or "
            "take it out of the folder"
        ) from None
    if node is None:
        return
    for tag in _tags(node, set()):
        if tag not in _PLAIN:
            _refuse(path, "`!function`" if tag == "!function" else f"the tag {tag!r}")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        return
    _check_config(path, config)
    includes = config.get("include") or []
    for name in includes if isinstance(includes, list) else [includes]:
        _check_file(path.parent / str(name), seen)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    from lm_eval.api.metrics import bits_per_byte  # noqa: F401  registers the metrics
    from lm_eval.api.registry import metric_registry

    for entry in _metric_list(str(path), config):
        metric = entry.get("metric")
        if entry.get("hf_evaluate") or metric not in metric_registry:
            _refuse(path, f"the metric {metric!r}, which is fetched and run")
    pickles = [text for text in _texts(config.get("dataset_kwargs")) if text.endswith(_PICKLES)]
    if config.get("dataset_path") == "pandas" or pickles:
        _refuse(path, "pickled data")
    members = config.get("task")
    for child in members if isinstance(members, list) else ():
        if isinstance(child, dict):
            _check_config(path, child)


def _metric_list(where: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = config.get("metric_list") or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise RecipeError(
            f"{where}: expected metric_list as a list of mappings, got {found!r}; write "
            "[{metric: acc}]"
        )
    return found


def _tags(node: yaml.Node, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:  # an alias can point at what holds it
        return
    seen.add(id(node))
    yield node.tag
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _tags(child, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _tags(key, seen)
            yield from _tags(value, seen)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)


def _refuse(path: Path, what: str) -> None:
    raise RecipeError(
        f"{path}: expected a task without code, got {what}, which would run here; look at it, and "
        "allow it with --allow-task-code (allow_task_code=True in Python)"
    )
