"""Pytest's side of the compatibility page: `--compatibility-results FILE` keeps what was shown."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from compatibility.cells import REFUSED, Observation, Results, marked_cells

PACKAGES = (
    "forgetless",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "hqq",
    "torchao",
    "optimum-quanto",
    "gptqmodel",
    "gguf",
    "llama-cpp-python",
)
# Folders of the machine: the last name of a path says enough.
_PATH = re.compile(r"(?:(?<=\s)|(?<=^)|(?<=[('\"]))(?:/[^\s/:;,()'\"]+)+/(?=[^\s/])")
COLLECTED = pytest.StashKey[list[tuple[str, dict[str, str]]]]()
_CELLS = pytest.StashKey[dict[str, list[tuple[dict[str, str], str]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compatibility-results",
        metavar="FILE",
        help="write what the tests marked `compatibility` showed, as JSON",
    )


@pytest.hookimpl(tryfirst=True)  # before -m takes tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cells = {item.nodeid: found for item in items if (found := marked_cells(item))}
    config.stash[_CELLS] = cells
    config.stash[COLLECTED] = [
        (_function(test), keys) for test, found in cells.items() for keys, _ in found
    ]


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--compatibility-results")
    if path:
        config.pluginmanager.register(_Recorder(config, Path(path)), "compatibility-recorder")


class _Recorder:
    """Turns reports into observations and writes them at the end."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._path = path
        self._found: dict[str, list[Observation]] = {}
        self._not_collected: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._not_collected[report.nodeid] = _skip_reason(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cells = self._config.stash[_CELLS].get(report.nodeid, [])
        if not cells or (report.when != "call" and report.passed):
            return
        outcome, reason = _outcome(report)
        self._found[report.nodeid] = [
            Observation(
                _function(report.nodeid),
                keys,
                "refused" if outcome == "pass" and refused else outcome,
                _shareable(reason or refused),
            )
            for keys, refused in cells
        ]

    def pytest_sessionfinish(self) -> None:
        found = tuple(one for several in self._found.values() for one in several)
        Results(_versions(), found, self._not_collected).save(self._path)


def _outcome(report: pytest.TestReport) -> tuple[str, str]:
    """Outcome and reason of one test."""
    refused = dict(report.user_properties).get(REFUSED, "")
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)  # a str where a fixture is missing
        message = crash.message if crash is not None else str(report.longrepr)
        return "fail", message.strip().splitlines()[0][:200]
    if hasattr(report, "wasxfail") and report.skipped:
        return "expected failure", report.wasxfail
    if report.skipped:
        return "skipped", _skip_reason(report)
    return ("refused", str(refused)) if refused else ("pass", "")


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What was said, without file and line."""
    told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return told.removeprefix("Skipped: ")


def _shareable(reason: str) -> str:
    """One line that names no folder of this machine."""
    return _PATH.sub("", " ".join(reason.split()))


def _function(test: str) -> str:
    return test.partition("[")[0]


def _versions() -> dict[str, str]:
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
