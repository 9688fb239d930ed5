"""No row stands in two roles."""

from __future__ import annotations

import pytest

from forgetless.data import DataSpec, Row, RowSet, refuse_overlap
from forgetless.errors import DataError


def texts(*rows: str, path: str = "a.jsonl") -> RowSet:
    return RowSet(DataSpec(path=path), tuple(Row("", row) for row in rows))


def test_disjoint_roles_pass_and_repeats_inside_a_role_too() -> None:
    refuse_overlap(
        {"train": [texts("a", "a"), texts("a")], "preserve": [texts("b")], "evaluation": []}
    )


def test_a_shared_row_names_both_roles_the_count_and_the_first_row() -> None:
    with pytest.raises(DataError) as error:
        refuse_overlap(
            {
                "train": [texts("x", "shared 1", "shared 2", path="train.jsonl")],
                "preserve": [texts("y")],
                "evaluation": [
                    texts("z", path="z.jsonl"),
                    texts("shared 2", "shared 1", "shared 2", path="test.jsonl"),
                ],
            }
        )
    message = str(error.value)
    assert message.startswith(
        "train and evaluation data: expected no row in both, got 2 rows, the first 'shared 2' in "
        "train.jsonl and test.jsonl"
    )
    assert "\n" not in message


def test_rows_are_compared_as_rendered_wherever_the_prompt_ends() -> None:
    split = RowSet(DataSpec(path="b.jsonl"), (Row("Q: a", " A: b"),))
    with pytest.raises(DataError, match="1 row,"):
        refuse_overlap({"train": [split], "preserve": [texts("Q: a A: b")]})


def test_white_space_does_not_hide_a_shared_row() -> None:
    spaced = texts("Q:  a\nA: b ")
    with pytest.raises(DataError, match="1 row,"):
        refuse_overlap({"train": [texts("Q: a A: b")], "preserve": [spaced]})
    assert spaced.fingerprint != texts("Q: a A: b").fingerprint
