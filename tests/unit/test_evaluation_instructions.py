"""Checkable constraints: each accepts what keeps it and refuses what breaks it."""

from __future__ import annotations

import pytest

from forgetless.errors import DataError
from forgetless.evaluation.instructions import follows_instructions, parse_constraint

CASES = [
    ("lowercase", "all small, 1 2 3", "Not small"),
    ("uppercase", "LOUD AND CLEAR", "Loud"),
    ("uppercase", "A1", "123"),
    ("words:3", " one two three\n", "one two"),
    ("min_words:2", "one two three", "one"),
    ("max_words:2", "one two", "one two three"),
    ("sentences:2", "First one. Second 3.5 one!", "Only one."),
    ("lines:2", "a\n\nb", "a"),
    ("bullets:2", "- a\n* b", "- a\nb"),
    ("json", '{"a": [1, 2]}', "{a: 1}"),
    ("json", '```json\n{"a": 1}\n```', "a"),
    ("no_commas", "a b", "a, b"),
    ("quoted", '"said"', '"said'),
    ("starts_with:Dear", "dear Ann", "Hello"),
    ("ends_with:done", "And we are Done.", "done and more"),
    ("ends_with:Is that all?", "Yes. Is that all?", "Yes."),
    ("includes:sun", "The Sun rises", "A sunny day"),
    ("excludes:sun", "A sunny day", "The Sun rises"),
]


@pytest.mark.parametrize(("constraint", "kept", "broken"), CASES)
def test_constraint_accepts_what_keeps_it_and_refuses_what_breaks_it(constraint, kept, broken):
    assert follows_instructions(kept, [constraint]) == 1
    assert follows_instructions(broken, [constraint]) == 0


def test_all_constraints_must_hold():
    assert follows_instructions("one two three", ["lowercase", "words:3"]) == 1
    assert follows_instructions("one two", ["lowercase", "words:3"]) == 0


def test_empty_text_follows_nothing():
    assert follows_instructions(" \n", ["lowercase"]) == 0


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("lowercased", "did you mean `lowercase`"),
        ("words:three", "expected a number"),
        ("ends_with:", "did you mean `ends_with:TEXT`"),
        ("lowercase:5", "did you mean `lowercase`"),
    ],
)
def test_unknown_constraint_names_the_nearest(constraint, message):
    with pytest.raises(DataError, match=message):
        parse_constraint(constraint)
