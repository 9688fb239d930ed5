"""replay: preserve rows mixed into the train rows, and trained on like them.

Source: experience replay as in arXiv:1811.11682, without a buffer: the user names what to keep.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from forgetless.data.tokens import TokenRow, has_target
from forgetless.models.placement import Sharding
from forgetless.training.regularisers.base import Binding, PreserveData, Regulariser, Term


@dataclass(frozen=True, kw_only=True)
class Replay(Regulariser):
    """Replay.

    Attributes:
        ratio: Share of preserve rows among the rows that are trained on, whatever their length; the
            train rows all stay, so that an epoch is longer.
    """

    ratio: float = 0.1

    name: ClassVar[str] = "replay"
    title: ClassVar[str] = "preserve rows mixed into the train rows"
    paper: ClassVar[str] = "experience replay, arXiv:1811.11682"
    needs_rows: ClassVar[bool] = True
    trains_on_rows: ClassVar[bool] = True
    sharded_by: ClassVar[frozenset[Sharding]] = frozenset({"FSDP", "DeepSpeed"})

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(
            0 < self.ratio < 1, f"ratio: expected a number between 0 and 1, got {self.ratio}"
        )

    def bind(self, to: Binding) -> Term:
        """Nothing is left to do while training."""
        return Term()

    def train_rows(
        self, rows: Sequence[TokenRow], preserve: PreserveData, seed: int
    ) -> list[TokenRow]:
        """Train rows, then drawn preserve rows, each of them once before any comes twice."""
        given = self._rows(preserve.rows_to_train_on)
        kept = [row for row in given if has_target(row)]
        self._require(
            bool(kept),
            f"expected rows of preserve data with a token to learn, got none in {len(given)}; give "
            "completions, or raise max_length",
        )
        count = max(1, round(len(rows) * self.ratio / (1 - self.ratio)))
        draw = random.Random(seed)
        drawn: list[TokenRow] = []
        while len(drawn) < count:
            drawn += draw.sample(kept, min(len(kept), count - len(drawn)))
        return [*rows, *drawn]
