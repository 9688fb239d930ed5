"""Values in messages are short and readable."""

from __future__ import annotations

import pytest

from forgetless.data.validation import shortened


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("short", "'short'"),
        ("x" * 70, "'" + "x" * 57 + "…'"),
        (list(range(40)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,…]"),
    ],
)
def test_a_long_value_is_cut_inside_its_quotes(value: object, shown: str) -> None:
    assert shortened(value) == shown
    assert len(shown) <= 60
