"""Source records: from a file, a folder, the hub or Python to mappings from column to value."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from forgetless.data.files import Record, as_record, files_of, read_file
from forgetless.data.spec import DataSpec
from forgetless.data.validation import shortened
from forgetless.errors import DataError


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
        ("examples", index, as_record(entry, f"examples: row {index}"))
        for index, entry in enumerate(examples)
    )


def _placed(path: Path, label: str) -> Iterator[tuple[str, int, Record]]:
    """File, row in it and record, of a file or of all files of a folder."""
    for file in files_of(path) if path.is_dir() else [path]:
        name = str(file) if path.is_dir() else label
        for row, record in enumerate(read_file(file)):
            yield name, row, record
