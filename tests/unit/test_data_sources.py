"""Files, folders, the hub and Python values become the same records; broken ones say where."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from forgetless.data import DataSpec
from forgetless.data import sources as sources_module
from forgetless.data.sources import read_records
from forgetless.errors import DataError

RECORDS = [{"q": f"question {i}, “quoted”", "a": f'answer {i} "x"\nline two'} for i in range(7)]


def write_jsonl(path: Path) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, indent=1), encoding="utf-8")


def write_lines_as_json(path: Path) -> None:
    path.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")


def write_separated(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["q", "a"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(RECORDS)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=2)


def records(**keys: Any) -> list[Any]:
    return [placed.record for placed in read_records(DataSpec(**keys))]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.json", write_json),
        ("b.json", write_lines_as_json),
        ("a.csv", write_separated),
        ("a.TSV", write_separated),
        ("a.parquet", write_parquet),
    ],
)
def test_every_file_format_gives_the_same_records(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    path = tmp_path / name.lower()
    write(path)
    path = path.rename(tmp_path / name)
    assert records(path=path) == RECORDS
    assert records(path=path, rows=(2, 5)) == RECORDS[2:5]


def test_a_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first\nparagraph\n\n \n\n  second\n", encoding="utf-8")
    assert records(path=path) == [{"text": "first\nparagraph"}, {"text": "  second"}]


def test_a_folder_is_read_in_the_order_of_its_files_without_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, text in [("b.txt", "b"), ("a.txt", "a"), ("deep/c.txt", "c"), (".cache/d.txt", "d")]:
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not data")
    assert [record["text"] for record in records(path=tmp_path)] == ["a", "b", "c"]


def test_a_row_of_a_folder_is_placed_in_its_file(tmp_path: Path) -> None:
    for name, count in (("a.jsonl", 3), ("b.jsonl", 2)):
        lines = (json.dumps({"text": f"{name} {row}"}) for row in range(count))
        (tmp_path / name).write_text("\n".join(lines))
    placed = read_records(DataSpec(path=tmp_path))
    assert [row.position for row in placed] == [0, 1, 2, 3, 4]
    assert placed[4].where == f"{tmp_path / 'b.jsonl'}: row 1"
    assert read_records(DataSpec(path=tmp_path, rows=(3, 5)))[0].where.endswith("b.jsonl: row 0")


def test_a_folder_of_text_and_rows_is_refused_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("Licence")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"got text \(README\.txt\) .* columns \(rows\.jsonl\)"):
        read_records(DataSpec(path=tmp_path))


def test_a_saved_dataset_is_read_with_its_split(tmp_path: Path) -> None:
    data = Dataset.from_list(RECORDS)
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict(test=data).save_to_disk(str(tmp_path / "several"))
    assert records(path=tmp_path / "one") == RECORDS
    assert records(path=tmp_path / "several", split="test") == RECORDS
    with pytest.raises(DataError, match="expected a split among test, got 'train'"):
        records(path=tmp_path / "several")


def test_python_values_give_records() -> None:
    assert records(examples=RECORDS) == RECORDS
    assert records(examples=["a", "b"]) == [{"text": "a"}, {"text": "b"}]
    assert records(examples=Dataset.from_list(RECORDS), rows=(1, 3)) == RECORDS[1:3]
    assert records(examples=DatasetDict(test=Dataset.from_list(RECORDS)), split="test") == RECORDS


def test_limit_draws_by_seed_keeps_the_order_and_grows_by_adding() -> None:
    drawn = [
        [row.position for row in read_records(DataSpec(examples=["x"] * 50, limit=n, seed=3))]
        for n in (10, 20)
    ]
    other = [row.position for row in read_records(DataSpec(examples=["x"] * 50, limit=10, seed=4))]
    assert drawn[0] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 10
    assert set(drawn[0]) < set(drawn[1])
    assert drawn[0] != other
    assert drawn[0] != list(range(10))


def test_limit_draws_inside_the_range() -> None:
    spec = DataSpec(examples=["x"] * 50, rows=(20, 30), limit=4)
    assert all(20 <= row.position < 30 for row in read_records(spec))
    assert len(read_records(spec.model_copy(update={"limit": 99}))) == 10


def test_reading_leaves_the_global_random_state_alone() -> None:
    random.seed(1)
    before = random.getstate()
    read_records(DataSpec(examples=["x"] * 9, limit=2))
    assert random.getstate() == before


def test_lines_behind_the_range_are_never_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert len(records(path=path, rows=(0, 2))) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: expected a JSON object"),
        ("a.jsonl", b'{"text": "open', "(Unterminated string starting at column 10); mend"),
        ("a.json", b'[{"text": "open', "got Unterminated string starting at column 11; mend"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: expected an object with columns"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', "line 2: expected a JSON array"),
        ("a.json", b'[{"text": "a"}, 3]', "entry 1: expected an object"),
        ("a.json", b'{\n "rows": []\n}', "line 1: expected a JSON object"),
        ("a.csv", b"q,a\n1,2\n3\n", "line 3: expected 2 values as in the header, got 1"),
        ("a.csv", b"q,a\n1,2,3\n", "line 2: expected 2 values as in the header, got 3"),
        ("a.csv", b'q,a\n"1,2\n', "not CSV"),
        ("a.parquet", b"PAR1 this is none", "not a readable Parquet file"),
        ("a.txt", b"caf\xe9", "expected UTF-8 text, got byte 0xe9"),
        ("a.jsonl", b"", "the data are empty"),
        ("a.jsonl", b"\n\n", "the data are empty"),
        ("a.json", b"[]", "the data are empty"),
        ("a.csv", b"q,a\n", "the data are empty"),
        ("a.txt", b" \n\n", "the data are empty"),
        ("a.xlsx", b"", "expected a file that ends in one of"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        records(path=path)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_empty_folders_and_ranges_beyond_the_data_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="got none of that name"):
        records(path=tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="expected a folder with"):
        records(path=tmp_path)
    (tmp_path / "a.txt").write_text("a\n\nb")
    with pytest.raises(DataError, match=r"expected rows up to 9.* got 2 rows"):
        records(path=tmp_path, rows=(1, 9))
    with pytest.raises(DataError, match="split goes with hub data"):
        records(path=tmp_path, split="test")


def test_a_hub_dataset_is_asked_for_by_subset_and_split_and_runs_no_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Dataset:
        asked.append((args, options))
        return Dataset.from_list(RECORDS)

    monkeypatch.setattr(sources_module, "load_dataset", load)
    assert records(hub="some/data", subset="main", split="test", rows=(0, 2)) == RECORDS[:2]
    assert records(hub="some/data") == RECORDS
    assert asked == [
        (("some/data", "main"), {"split": "test"}),
        (("some/data", None), {"split": "train"}),
    ]


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("no\nnetwork"),
        ValueError('Unknown split "x"'),
        RuntimeError("Dataset scripts are no longer supported"),
        datasets.exceptions.DatasetGenerationError("broken"),
    ],
)
def test_a_hub_dataset_that_does_not_load_is_one_line(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_args: Any, **_options: Any) -> Dataset:
        raise failure

    monkeypatch.setattr(sources_module, "load_dataset", fail)
    with pytest.raises(DataError, match="hub dataset some/data, split train") as error:
        records(hub="some/data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("examples", ["text", {"text": "a"}, 3, iter([1])])
def test_examples_that_are_no_rows_are_refused(examples: object) -> None:
    with pytest.raises(DataError, match="examples: expected a list"):
        records(examples=examples)


def test_an_example_that_is_no_record_is_named_by_its_row() -> None:
    with pytest.raises(DataError, match="examples: row 1: expected an object"):
        records(examples=["a", 3])
