"""Templates over columns: `{column}` and nothing else.

`str.format` would follow attributes and indices (`{a.__class__}`), so that a template could reach
beyond its record; here a field is looked up by its exact name, once.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from forgetless.data.validation import nearest, shortened
from forgetless.errors import DataError


def columns_of(template: str, where: str) -> list[str]:
    """Names of the columns that a template uses, in order.

    Raises:
        DataError: Unbalanced braces, or a field that is more than a column's name.
    """
    return [column for _, column in _parts(template, where) if column is not None]


def fill(template: str, record: Mapping[str, Any], where: str) -> str:
    """Render a template for one record; a list-valued field gives its first item.

    Args:
        template: Text with `{column}` fields; `{{` and `}}` stand for braces.
        record: Column to value.
        where: Row, for messages.

    Raises:
        DataError: A field that the record lacks, or whose value is empty or has parts of its own.
    """
    return "".join(
        literal + (_text(template, record, column, where) if column is not None else "")
        for literal, column in _parts(template, where)
    )


def list_values(template: str, record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """All items of the first list-valued field that a template uses; empty where there is none."""
    for column in columns_of(template, where):
        value = record.get(column)
        if isinstance(value, list | tuple):
            return tuple(_scalar(item, column, where) for item in value)
    return ()


def _parts(template: str, where: str) -> list[tuple[str, str | None]]:
    """(text, column behind it) pairs; the last one's column may be None."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as failure:
        raise DataError(
            f"{where}: template {shortened(template)}: {failure}; write {{{{ and }}}} for literal "
            "braces"
        ) from None
    parts: list[tuple[str, str | None]] = []
    for literal, column, form, conversion in parsed:
        if column is not None and (
            column == "" or form or conversion or any(mark in column for mark in ".[]{}")
        ):
            field = column + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise DataError(
                f"{where}: template {shortened(template)}: expected a plain column name in braces, "
                f"got {{{field}}}; attributes, indices and formats are not followed"
            )
        parts.append((literal, column))
    return parts


def _text(template: str, record: Mapping[str, Any], column: str, where: str) -> str:
    if column not in record:
        raise DataError(
            f"{where}: template {shortened(template)} names the field {column!r}, which is not "
            f"among the columns {', '.join(map(str, record))}{_meant(column, record)}"
        )
    value = record[column]
    if isinstance(value, list | tuple):
        if not value:
            raise DataError(f"{where}: field {column!r}: expected at least one item, got none")
        value = value[0]
    return _scalar(value, column, where)


def _meant(column: str, record: Mapping[str, Any]) -> str:
    hint = nearest(column, map(str, record))
    return hint if hint.startswith("; did") else ""


def _scalar(value: object, column: str, where: str) -> str:
    if value is None:
        raise DataError(f"{where}: field {column!r} is empty (null); fill it or leave the row out")
    if not isinstance(value, str | int | float):
        raise DataError(
            f"{where}: field {column!r}: expected text or a number, got {shortened(value)}; "
            "flatten it into columns first"
        )
    return str(value)
