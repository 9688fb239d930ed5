"""Data specs to rendered rows to token batches and masks."""

from forgetless.data.loading import load_rows
from forgetless.data.overlap import refuse_overlap
from forgetless.data.rows import Row, RowSet
from forgetless.data.self_sampling import sample_self
from forgetless.data.spec import DataInput, DataSpec, parse_data
from forgetless.data.tokens import (
    Batch,
    TokenRow,
    count_truncated,
    count_without_completion,
    make_batches,
    pad_token_id,
    tokenize,
)

__all__ = [
    "Batch",
    "DataInput",
    "DataSpec",
    "Row",
    "RowSet",
    "TokenRow",
    "count_truncated",
    "count_without_completion",
    "load_rows",
    "make_batches",
    "pad_token_id",
    "parse_data",
    "refuse_overlap",
    "sample_self",
    "tokenize",
]
