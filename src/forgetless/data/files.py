"""Data files: which lie in a folder, and the records in each by its format."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from forgetless.data.spec import FILE_SUFFIXES
from forgetless.data.validation import shortened
from forgetless.errors import DataError

Record = Mapping[str, Any]


def files_of(folder: Path) -> list[Path]:
    """The data files in a folder, in their order: all text, or none.

    Raises:
        DataError: No data file in it, or text files beside others.
    """
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


def read_file(path: Path) -> Iterator[Record]:
    """The records of one file, read as they are asked for.

    Raises:
        DataError: Another format, or a file that cannot be read; its line where it has one.
    """
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
                yield as_record(json.loads(line), where)
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
        yield as_record(entry, f"{path}: entry {index}")


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


def as_record(entry: object, where: str) -> Record:
    """An entry of a list as a record; a string is its text.

    Raises:
        DataError: Neither a mapping nor a string.
    """
    if isinstance(entry, str):
        return {"text": entry}
    if isinstance(entry, Mapping):
        return entry
    raise DataError(f"{where}: expected an object with columns or a string, got {shortened(entry)}")


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
