"""Rows that stand in two roles at once would flatter every figure: they are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forgetless.data.rows import RowSet
from forgetless.data.validation import shortened
from forgetless.errors import DataError


def refuse_overlap(sets: Mapping[str, Sequence[RowSet]]) -> None:
    """Refuse rows that two roles share, by their rendered text; white space makes no difference.

    Rows that appear twice within one role are the user's choice and pass.

    Args:
        sets: Role (`train`, `preserve`, `evaluation`, …) to its row sets.

    Raises:
        DataError: Names both roles, how many different rows they share, and the first of them.
    """
    first_seen: dict[str, tuple[str, str]] = {}
    for role, row_sets in sets.items():
        shared: dict[str, list[str]] = {}
        texts: set[str] = set()
        example: dict[str, str] = {}
        for row_set in row_sets:
            for row in row_set.rows:
                digest = row.digest
                if digest in texts:
                    continue
                texts.add(digest)
                earlier = first_seen.setdefault(digest, (role, row_set.spec.label))
                if earlier[0] != role:
                    shared.setdefault(earlier[0], []).append(digest)
                    places = f"in {earlier[1]} and {row_set.spec.label}"
                    example.setdefault(earlier[0], f"{shortened(row.text)} {places}")
        for other, digests in shared.items():
            count = f"{len(digests)} row{'s' if len(digests) > 1 else ''}"
            raise DataError(
                f"{other} and {role} data: expected no row in both, got {count}, the first "
                f"{example[other]}; take disjoint rows (see the key rows)"
            )
