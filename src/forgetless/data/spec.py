"""Data specs: where rows come from and how a row becomes text. The same keys everywhere.

Python, YAML and overrides on the command line all end in a `DataSpec`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, IterableDataset
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from forgetless.data.validation import shortened, validated
from forgetless.errors import DataError, RecipeError

Tokens = Literal["all", "completion"]
SourceWeights = Literal["tokens", "equal"]  # of several sources of one role
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


class DataSpec(BaseModel):
    """One source of rows: exactly one of `path`, `hub`, `self` and `examples`.

    Attributes:
        path: A JSONL, JSON, CSV, TSV, Parquet or text file, or a folder of such files.
        hub: A dataset id on the Hugging Face hub, with `subset` its configuration name.
        self_sampled: Text sampled from the base model itself (key `self`).
        examples: Rows given in Python: strings, mappings, or a `datasets.Dataset`.
        split: Split of a hub dataset or of a `DatasetDict`; `train` where it is not given.
        subset: Configuration name of a hub dataset.
        rows: Half-open range [start, stop) of source rows, taken before `limit`.
        text: Template of a plain-text row, over columns: `"{title}: {body}"`.
        prompt: Template of the prompt; goes with `completion`.
        completion: Template of the completion; only it is trained on.
        messages: Name of a column that holds chat messages, or a list of `{role, content}`
            templates.
        max_length: Rows longer than this many tokens are truncated, and counted.
        limit: Take this many rows, drawn with `seed`; all rows where it is not given.
        seed: Seed of that draw, and of `self` sampling.
        tokens: Which tokens calibration counts; padding never counts.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, arbitrary_types_allowed=True
    )

    path: Path | None = None
    hub: str | None = None
    self_sampled: bool = Field(default=False, alias="self")
    examples: Any = None
    split: str | None = None
    subset: str | None = None
    rows: tuple[int, int] | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | tuple[dict[str, str], ...] | None = None
    max_length: int = Field(default=512, ge=2)
    limit: int | None = Field(default=None, ge=1)
    seed: int = 0
    tokens: Tokens = "all"

    @field_validator("rows")
    @classmethod
    def _ordered(cls, rows: tuple[int, int] | None) -> tuple[int, int] | None:
        if rows is not None and not 0 <= rows[0] < rows[1]:
            raise ValueError(f"expected [start, stop] with 0 <= start < stop, got {list(rows)}")
        return rows

    @field_validator("messages")
    @classmethod
    def _turns(
        cls, messages: str | tuple[dict[str, str], ...] | None
    ) -> str | tuple[dict[str, str], ...] | None:
        if isinstance(messages, tuple):
            if any(set(message) != {"role", "content"} for message in messages):
                raise ValueError("expected every message to have the keys role and content")
            if not messages or messages[-1]["role"] != "assistant":
                raise ValueError("expected the last message to be the assistant's: it is learned")
        return messages

    @model_validator(mode="after")
    def _one_source_one_template(self) -> DataSpec:
        sources = {
            "path": self.path is not None,
            "hub": self.hub is not None,
            "self": self.self_sampled,
            "examples": self.examples is not None,
        }
        if sum(sources.values()) != 1:
            given = ", ".join(name for name, is_given in sources.items() if is_given) or "none"
            raise ValueError(
                f"expected exactly one of path, hub, self and examples, got {given}; rows given "
                "in Python go under examples"
            )
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together: give both templates")
        templates = [t for t in (self.text, self.prompt, self.messages) if t is not None]
        if len(templates) > 1:
            raise ValueError("give one of text, prompt + completion, and messages")
        if templates and self.self_sampled:
            raise ValueError("self takes no template: its rows are text that the model wrote")
        if self.subset is not None and self.hub is None:
            raise ValueError("subset goes with hub: it names a configuration of a hub dataset")
        if self.split is not None and self.self_sampled:
            raise ValueError("self has no splits; take other rows with rows or seed")
        return self

    @field_serializer("examples", when_used="json")
    def _plain_examples(self, examples: Any) -> Any:
        """A record holds the rows of a list as they are, of a Dataset only what it was."""
        if isinstance(examples, Dataset | DatasetDict | IterableDataset):
            return f"{type(examples).__name__} of the caller"
        return examples

    @property
    def further(self) -> tuple[str, ...]:
        """Templates of more texts that go with each row; only evaluation items have some."""
        return ()

    @property
    def label(self) -> str:
        """Short name for messages and reports: the path, the hub id, `self` or `examples`."""
        if self.self_sampled:
            return "self"
        return str(self.path or self.hub or "examples")


DataInput = str | Path | DataSpec | Mapping[str, Any] | Sequence[Any]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def parse_data(
    value: DataInput, *, strings: Literal["text", "spec"] = "text", where: str = "data"
) -> list[DataSpec]:
    """Turn whatever names data into data specs.

    Args:
        value: A spec or its keys as a mapping; a path or hub id; `"self"`; a `datasets.Dataset`; a
            list of strings; or a list of several of these.
        strings: What a list of strings is: texts to tokenise as they stand (the Python API), or
            one spec each (recipes). A list that holds anything but strings is one spec an entry.
        where: What to call the value in messages.

    Raises:
        RecipeError: An unknown key, or values that do not fit together.
        DataError: A file that does not exist, or a value that names no data.
    """
    if isinstance(value, DataSpec):
        return [value]
    if isinstance(value, Path):
        return [_named(str(value), where, is_path=True)]
    if isinstance(value, str):
        return [_named(value, where)]
    # A DatasetDict is a mapping, and a Dataset is a sequence: they come before both.
    if isinstance(value, Dataset | DatasetDict):
        return [DataSpec(examples=value)]
    if isinstance(value, IterableDataset):
        raise DataError(
            f"{where}: expected a datasets.Dataset, got an IterableDataset; take its rows first: "
            "Dataset.from_list(list(dataset.take(1000)))"
        )
    if isinstance(value, Mapping):
        return [validated(DataSpec, value, where)]
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise DataError(
            f"{where}: expected a path, a hub id, `self`, a mapping of data keys, a Dataset or a "
            f"list of these, got {'nothing' if value is None else shortened(value)}"
        )
    if value and strings == "text" and all(isinstance(entry, str) for entry in value):
        _refuse_names(value, where)
        return [DataSpec(examples=list(value))]
    return [spec for index, entry in enumerate(value) for spec in _entry(entry, f"{where}.{index}")]


def _entry(value: Any, where: str) -> list[DataSpec]:
    """One entry of a list; lists do not nest."""
    if isinstance(value, list | tuple):
        raise RecipeError(
            f"{where}: expected one data spec, got a list; write its entries side by side"
        )
    return parse_data(value, where=where)


def _named(name: str, where: str, *, is_path: bool = False) -> DataSpec:
    """A spec from one string. An existing path wins over a hub id."""
    if name == "self" and not is_path:
        return DataSpec(self_sampled=True)
    path = Path(name).expanduser()
    if name and path.exists():
        return DataSpec(path=path)
    looks_like_path = is_path or path.suffix.lower() in FILE_SUFFIXES
    if looks_like_path or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise DataError(
            f"{where}: expected an existing file or folder, a hub dataset id or `self`, got "
            f"{shortened(name)}; check the path (relative to {shortened(str(Path.cwd()))})"
        )
    return DataSpec(hub=name)


def _refuse_names(texts: Sequence[str], where: str) -> None:
    """A list of strings is text: a name of data among them would be learned as text."""
    for text in texts:
        is_file = len(text) < 256 and text.endswith(FILE_SUFFIXES) and Path(text).exists()
        if text == "self" or is_file:
            key = '{"self": True}' if text == "self" else f'{{"path": "{text}"}}'
            raise DataError(
                f"{where}: a list of strings is taken as texts, and {text!r} stands in it; write "
                f"{key} to name data"
            )
