"""Source records: from a file, a folder, the hub or Python to mappings from column to value."""

from __future__ import annotations

import csv
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from forgetless.data.spec import FILE_SUFFIXES, DataSpec
from forgetless.data.validation import shortened
from forgetless.errors import DataError

Record = Mapping[str, Any]


class Placed(NamedTuple):
    """A record, its position in the source, and the file that holds it with its row there."""

    position: int
    file: str
    row: int
    record: Record

    @property
    def where(self) -> str:
        """To begin a message with; rows count from 0."""
        return f"{self.file}: row {self.row}"


def read_records(spec: DataSpec) -> list[Placed]:
    """Read a spec's records, with the place of each in its source.

    `rows` is a range of the source; `limit` draws from that range with `seed`, keeps the source's
    order, and takes more rows of the same draw as it grows.

    Raises:
        DataError: The source is missing, broken or empty, or has fewer rows than `rows` says.
    """
    source = _source(spec)
    if isinstance(source, Dataset):
        chosen = choose(range(len(source)), spec)
        return [Placed(index, spec.label, index, source[index]) for index in chosen]
    # What lies behind the range is never read.
    records = list(itertools.islice(source, spec.rows[1] if spec.rows else None))
    return [Placed(index, *records[index]) for index in choose(range(len(records)), spec)]


def _source(spec: DataSpec) -> Dataset | Iterator[tuple[str, int, Record]]:
    if spec.hub is not None:
        return _read_hub(spec, spec.hub)
    if spec.path is not None:
        path = spec.path.expanduser()
        if not path.exists():
            raise DataError(f"{spec.label}: expected a file or folder, got none of that name")
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _of_split(load_from_disk(str(path)), spec)
        if spec.split is not None:
            raise DataError(
                f"{spec.label}: split goes with hub data; choose rows of a file with rows: "
                "[start, stop]"
            )
        return _placed(path, spec.label)
    if spec.self_sampled:
        raise DataError("self: expected a model to sample from, got none; load it with load_rows")
    return _read_examples(spec)


def choose(positions: range, spec: DataSpec) -> Sequence[int]:
    """Which of a source's rows a spec takes: its range first, then its draw, in the source's order.

    Raises:
        DataError: There are no rows, or fewer than the range asks for.
    """
    if not positions:
        raise DataError(f"{spec.label}: expected at least one row, got none; the data are empty")
    if spec.rows is not None:
        start, stop = spec.rows
        if stop > len(positions):
            raise DataError(
                f"{spec.label}: expected rows up to {stop}, as `rows: [{start}, {stop}]` asks, "
                f"got {len(positions)} rows; lower the range"
            )
        positions = positions[start:stop]
    if spec.limit is None or spec.limit >= len(positions):
        return positions
    drawn = list(positions)
    random.Random(spec.seed).shuffle(drawn)
    return sorted(drawn[: spec.limit])


def _read_hub(spec: DataSpec, hub: str) -> Dataset:
    split = spec.split or "train"
    try:
        return load_dataset(hub, spec.subset, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError, ImportError) as failure:
        reason = " ".join(str(failure).split())[:240]
        subset = f", subset {spec.subset}" if spec.subset else ""
        raise DataError(
            f"hub dataset {hub}{subset}, split {split}: could not be loaded "
            f"({type(failure).__name__}: {reason}); a local file or folder goes under path"
        ) from failure


def _of_split(data: Dataset | DatasetDict, spec: DataSpec) -> Dataset:
    if isinstance(data, Dataset):
        return data
    split = spec.split or "train"
    if split not in data:
        raise DataError(
            f"{spec.label}: expected a split among {', '.join(data)}, got {split!r}; set split"
        )
    return data[split]


def _read_examples(spec: DataSpec) -> Dataset | Iterator[tuple[str, int, Record]]:
    examples = spec.examples
    if isinstance(examples, Dataset | DatasetDict):
        return _of_split(examples, spec)
    if isinstance(examples, str | Mapping) or not isinstance(examples, Sequence):
        raise DataError(
            "examples: expected a list of strings or mappings, or a datasets.Dataset, got "
            f"{shortened(examples)}"
        )
    return (
        ("examples", index, _as_record(entry, f"examples: row {index}"))
        for index, entry in enumerate(examples)
    )


def _as_record(entry: object, where: str) -> Record:
    if isinstance(entry, str):
        return {"text": entry}
    if isinstance(entry, Mapping):
        return entry
    raise DataError(f"{where}: expected an object with columns or a string, got {shortened(entry)}")


def _placed(path: Path, label: str) -> Iterator[tuple[str, int, Record]]:
    """File, row in it and record, of a file or of all files of a folder."""
    for file in _files_of(path) if path.is_dir() else [path]:
        name = str(file) if path.is_dir() else label
        for row, record in enumerate(_read_file(file)):
            yield name, row, record


def _files_of(folder: Path) -> list[Path]:
    """The data files in a folder, in their order: all text, or none."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in FILE_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"{folder}: expected a folder with {', '.join(FILE_SUFFIXES)} files, got none in it"
        )
    text = [file for file in files if file.suffix.lower() == ".txt"]
    if text and len(text) < len(files):
        other = next(file for file in files if file not in text)
        raise DataError(
            f"{folder}: expected files of one kind, got text ({text[0].relative_to(folder)}) "
            f"beside rows with columns ({other.relative_to(folder)}); move one of the two out of "
            "the folder, or name each file"
        )
    return files


def _read_file(path: Path) -> Iterator[Record]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: expected a file that ends in one of {', '.join(FILE_SUFFIXES)}, got "
            f"{path.suffix or 'no suffix'!r}; rename it or convert it"
        )
    try:
        yield from reader(path)
    except UnicodeDecodeError as failure:
        raise DataError(
            f"{path}: expected UTF-8 text, got byte {failure.object[failure.start]:#04x} at "
            f"{failure.start}; save it as UTF-8"
        ) from failure
    except OSError as failure:
        raise DataError(f"{path}: could not be read ({failure.strerror or failure})") from failure


def _read_jsonl(path: Path) -> Iterator[Record]:
    # utf-8-sig: editors on Windows begin files with a byte order mark.
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                yield _as_record(json.loads(line), where)
            except json.JSONDecodeError as failure:
                raise DataError(
                    f"{where}: expected a JSON object, got {shortened(line.strip())} "
                    f"({_fault(failure)}); mend or remove the line"
                ) from failure


def _read_json(path: Path) -> Iterator[Record]:
    """An array of records; or, as files of that name on the hub often are, one object a line."""
    content = path.read_text(encoding="utf-8-sig")
    if not content.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        entries = json.loads(content)
    except json.JSONDecodeError as failure:
        raise DataError(
            f"{path}: line {failure.lineno}: expected a JSON array of objects, got "
            f"{_fault(failure)}; mend the file"
        ) from failure
    for index, entry in enumerate(entries):
        yield _as_record(entry, f"{path}: entry {index}")


def _fault(failure: json.JSONDecodeError) -> str:
    """What and where; some of the decoder's messages end in `at` themselves."""
    return f"{failure.msg.removesuffix(' at')} at column {failure.colno}"


def _read_csv(path: Path) -> Iterator[Record]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for record in reader:
                # DictReader files surplus values under None, and None under missing ones.
                if None in record or None in record.values():
                    width = len(reader.fieldnames or ())
                    raise DataError(
                        f"{path}: line {reader.line_num}: expected {width} values as in the "
                        f"header, got {_width(record)}; quote values that hold a delimiter"
                    )
                yield record
        except csv.Error as failure:
            raise DataError(f"{path}: line {reader.line_num}: not CSV ({failure})") from failure


def _width(record: Mapping[Any, Any]) -> int:
    surplus = record.get(None, [])
    return sum(value is not None for key, value in record.items() if key is not None) + len(surplus)


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as failure:
        reason = " ".join(str(failure).split())[:160]
        raise DataError(f"{path}: not a readable Parquet file ({reason})") from failure


def _read_text(path: Path) -> Iterator[Record]:
    """Paragraphs: text between blank lines."""
    for paragraph in re.split(r"\n[^\S\n]*\n", path.read_text(encoding="utf-8-sig")):
        if paragraph.strip():
            yield {"text": paragraph.strip("\n")}


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
