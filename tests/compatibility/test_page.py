"""The renderer on made-up results, and the committed page against the tests that there are."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compatibility.cells import Observation, Results
from compatibility.page import TABLES, main, render
from compatibility.plugin import COLLECTED
from forgetless.escaping import markdown_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"


def results(*observations: Observation, **not_collected: str) -> Results:
    return Results({"python": "3.11", "torch": "2.13"}, observations, not_collected)


def seen(outcome: str, reason: str = "", **keys: str) -> Observation:
    return Observation("tests/test_a.py::test_b", keys, outcome, reason)


def tables_of(page: str) -> dict[str, list[list[str]]]:
    """Cells of each table, by the heading above it; the rule between head and body left out."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in page.splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("|") and not line.startswith("| ---"):
            cells = re.split(r"(?<!\\)\|", line.strip("|"))
            found.setdefault(title, []).append([cell.strip() for cell in cells])
    return found


def test_a_cell_shows_the_worst_of_its_tests() -> None:
    page = render(
        results(
            seen("pass", base="llama", form="a", export="peft"),
            seen("fail", "boom", base="llama", form="both", export="peft"),
            seen("refused", "use a", base="llama", form="b", export="peft"),
            seen("pass", base="llama", form="a", export="merged"),
        )
    )
    table = tables_of(page)["Architecture and export"]
    assert table == [["architecture", "peft", "merged"], ["Llama", "✗ fails (1)", "✓"]]
    assert "\n1. form both: boom\n" in page
    assert "results: 2 pass, 1 refused, 1 fail." in page


def test_reasons_are_numbered_once_and_escaped() -> None:
    why = "no `x` | <b> here"
    page = render(
        results(
            seen("skipped", why, base="llama", export="peft"),
            seen("skipped", why, base="qwen2", export="peft"),
            seen("expected failure", "later", base="phi", export="peft"),
        )
    )
    [_, *rows] = tables_of(page)["Architecture and export"]
    marks = ["skipped (1)", "skipped (1)", "known to fail (2)"]
    assert [row[1] for row in rows] == marks
    assert f"\n1. {markdown_text(why)}\n2. later\n" in page


def test_a_cell_that_was_never_tried_is_empty() -> None:
    page = render(
        results(
            seen("pass", base="llama", export="peft"), seen("pass", base="phi", export="merged")
        )
    )
    assert tables_of(page)["Architecture and export"][1:] == [
        ["Llama", "✓", ""],
        ["Phi", "", "✓"],
    ]


def test_a_quantised_base_stands_only_where_the_table_says_so() -> None:
    page = render(results(seen("pass", base="llama", export="peft", quantization="nf4")))
    assert set(tables_of(page)) == {
        "Quantised base and architecture",
        "Quantised base and export",
        "Tests",
    }


def test_the_same_results_give_the_same_page_also_from_a_file(tmp_path: Path) -> None:
    found = results(
        seen("pass", base="llama", export="peft"),
        seen("skipped", "no GPU", trainer="sft", start="attach", feature="packing"),
        **{"tests/test_q.py": "needs bitsandbytes"},
    )
    found.save(tmp_path / "results.json")
    assert main(str(tmp_path / "results.json"), str(tmp_path / "page.md")) == 0
    page = (tmp_path / "page.md").read_text()
    assert page == render(found)
    assert "- `tests/test_q.py`: needs bitsandbytes" in page


def test_a_failing_cell_is_on_the_page_and_in_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results(seen("fail", "boom", base="llama", export="peft")).save(tmp_path / "results.json")
    assert main(str(tmp_path / "results.json"), str(tmp_path / "page.md")) == 1
    assert "✗ fails" in (tmp_path / "page.md").read_text()
    assert "tests/test_a.py::test_b" in capsys.readouterr().err


INNER = """
import pytest

mark = pytest.mark.compatibility

@mark(base="{name}", export="peft")
@mark(base="{name}", form="{method[trains]}")
@pytest.mark.parametrize("method", [{"trains": "b"}])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_one(name, method):
    assert name == "llama", "phi is wrong"

@mark(base="gpt2", export="peft")
def test_skipped():
    pytest.skip("reads /some/where/folder/file.txt")

@mark(base="bart", export="peft")
@pytest.mark.xfail(reason="not yet")
def test_expected():
    assert False

@mark(base="t5", export="gguf", refused="use merged")
def test_refusal():
    pass

@mark(base="mixtral", export="peft")
def test_without_its_fixture(no_such_fixture):
    pass

@mark(base="qwen2", export="gguf")
def test_refused_inside(request):
    from compatibility.cells import refuse
    refuse(request, "no such layer")

def test_unmarked():
    pass
"""


def test_outcomes_and_reasons_reach_the_file(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_inner=INNER)
    pytester.makepyfile(test_missing="import pytest\npytest.importorskip('no_such_package')")
    pytester.runpytest_inprocess(
        "-p", "compatibility.plugin", "--compatibility-results", "out/found.json"
    )
    found = Results.load(pytester.path / "out" / "found.json")
    shown = {
        (one.keys["base"], one.keys.get("form", "-")): (one.outcome, one.reason)
        for one in found.observations
    }
    assert shown[("llama", "b")] == shown[("llama", "-")] == ("pass", "")
    assert shown[("phi", "b")][0] == shown[("phi", "-")][0] == "fail"
    assert "phi is wrong" in shown[("phi", "b")][1]
    assert shown[("gpt2", "-")] == ("skipped", "reads file.txt")
    assert shown[("bart", "-")] == ("expected failure", "not yet")
    assert shown[("t5", "-")] == ("refused", "use merged")
    assert shown[("qwen2", "-")] == ("refused", "no such layer")
    assert shown[("mixtral", "-")][0] == "fail"
    assert len(found.observations) == 9
    assert {one.test for one in found.observations} >= {"test_inner.py::test_one"}
    [path] = found.not_collected
    assert path == "test_missing.py"
    assert "no_such_package" in found.not_collected[path]


def test_a_key_that_is_none_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import pytest\n@pytest.mark.compatibility(basis='llama')\ndef test_a(): pass"
    )
    done = pytester.runpytest_inprocess("-p", "compatibility.plugin")
    done.stderr.fnmatch_lines(["*expected the keys base, form, *, got basis*"])


# Stands for the environment's Python: notes what it was asked for, and ends as pytest would.
STUB = """#!/bin/sh
echo "$*" >> "{folder}/asked"
case "$*" in *"-m pytest"*) exit {status};; esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("status", "arguments", "page", "ends"),
    [
        (0, "", True, 0),
        (1, "", True, 0),  # a failing cell is on the page; what writes it has a status of its own
        (2, "", False, 2),  # interrupted, or an error in a test file
        (4, "", False, 2),
        (5, "", False, 2),  # nothing was collected
        (0, "-k llama", False, 0),
        (2, "-k llama", False, 2),
    ],
)
def test_make_writes_the_page_from_a_whole_new_run_only(
    status: int, arguments: str, page: bool, ends: int, tmp_path: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB.format(folder=tmp_path, status=status))
    python.chmod(0o755)
    stale = tmp_path / "results.json"
    stale.write_text("{}")
    variables = [f"VENV={tmp_path}/venv", f"RESULTS={stale}", f"ARGS={arguments}"]
    command = ["make", "compatibility", "--old-file", f"{tmp_path}/venv/.setup-done", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == ends, done.stderr
    assert not stale.exists()
    asked = (tmp_path / "asked").read_text()
    assert ("compatibility.page" in asked) == page
    assert ("is left as it is" in done.stdout) == (bool(arguments) and ends == 0)


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE.read_text())
    assert named
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{path} has no {function}: run make compatibility"


def test_the_page_has_the_cells_of_the_tests_and_no_others(request: pytest.FixtureRequest) -> None:
    page = PAGE.read_text()
    left_out = set(re.findall(r"^- `(tests/\S+\.py)`: ", page, re.MULTILINE))
    collected = [
        (test, keys)
        for test, keys in request.config.stash[COLLECTED]
        if test.partition("::")[0] not in left_out
    ]
    named = {f"{path}::{name}" for path, name in re.findall(r"`(tests/\S+\.py)::(\w+)`", page)}
    missing = named - {test for test, _ in collected}
    if missing:
        pytest.skip(f"compares what was collected: run the whole suite; {len(missing)} are missing")
    assert named == {test for test, _ in collected}, "run make compatibility"
    shown = tables_of(page)
    for table in TABLES:
        expected = {table.place(keys) for _, keys in collected if table.shows(keys)}
        [head, *rows] = shown.get(table.title, [[]])
        width = len(table.rows)
        found = {
            (tuple(row[:width]), column)
            for row in rows
            for column, mark in zip(head[width:], row[width:], strict=True)
            if mark
        }
        written = {
            (tuple(map(markdown_text, row)), markdown_text(column)) for row, column in expected
        }
        assert found == written, f"{table.title}: run make compatibility"
