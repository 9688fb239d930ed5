"""What a regulariser is: a training-time term, projection or choice of rows; any method takes any.

A regulariser holds options. Bound to a model and its preserve data it becomes a `Term`, which the
trainer calls around every optimiser step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from forgetless.calibration.engine import SiteMoments
from forgetless.data.tokens import TokenRow
from forgetless.errors import TrainingError
from forgetless.methods.base import Held
from forgetless.models.pair import TunedModel
from forgetless.models.placement import Sharding


@dataclass(frozen=True, slots=True)
class PreserveData:
    """What must be kept, as regularisers use it.

    Attributes:
        moments: Second moments of the base on it; None where no regulariser asks for them.
        rows: Its token rows.
        rows_to_train_on: The same, ended as train rows are.
    """

    moments: SiteMoments | None = None
    rows: Sequence[TokenRow] = ()
    rows_to_train_on: Sequence[TokenRow] = ()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Which forward pass of training this is.

    Attributes:
        step: Optimiser steps taken before.
        index: Forward passes of this step before.
        count: Forward passes of this step, fewer at the end of an epoch.
        stride: Forward passes of a whole step.
    """

    step: int
    index: int
    count: int
    stride: int


@dataclass(frozen=True, slots=True)
class Binding:
    """What a term works on.

    Attributes:
        model: The model that is tuned, at its start.
        adapter: The adapter that trains; empty where every weight does.
        data: What must be kept.
        tokenizer: For the padding token.
        seed: Of whatever is drawn.
    """

    model: TunedModel
    adapter: str
    data: PreserveData
    tokenizer: PreTrainedTokenizerBase
    seed: int


class Term:
    """A regulariser at work; it does nothing where a method is not overridden."""

    def loss(self, model: nn.Module, micro: MicroBatch) -> Tensor | None:
        """This forward pass's share of the term of one optimiser step; None for nothing.

        Args:
            model: The adapted model as the trainer has wrapped it.
            micro: Which forward pass this is. Over one step the shares add up to the term.
        """
        return None

    def before_step(self) -> None:
        """Gradients are there, the optimiser has not moved anything."""

    def after_step(self) -> None:
        """The optimiser has moved what trains."""


@dataclass(frozen=True, kw_only=True)
class Regulariser(ABC):
    """Options of one regulariser. Subclasses are frozen dataclasses.

    Attributes:
        name: As recipes call it.
        title: One line: what it does.
        paper: Source.
        needs_moments: Whether second moments of preserve data must be collected.
        needs_rows: Whether it reads rows of preserve data.
        trains_on_rows: Whether it trains on them like on train rows.
        forms: Forms of adapter that it works on; `full` stands for every weight.
        sharded_by: With whose sharding of the model it works: it reads no weights or gradients of
            which a process holds but a part.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    needs_moments: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False
    trains_on_rows: ClassVar[bool] = False
    forms: ClassVar[frozenset[Held]] = frozenset({"plain", "a", "b", "both", "full"})
    sharded_by: ClassVar[frozenset[Sharding]] = frozenset()

    @property
    def needs_preserve(self) -> bool:
        """Whether it needs preserve data at all."""
        return self.needs_moments or self.needs_rows

    @abstractmethod
    def bind(self, to: Binding) -> Term:
        """Get ready for training.

        Raises:
            TrainingError: The preserve data that it needs are not there.
        """

    def check_form(self, form: Held) -> None:
        """Refuse a form of adapter that it would do nothing on, and full fine-tuning.

        Raises:
            TrainingError: Says what to do.
        """
        self._require(
            form != "full" or form in self.forms,
            "expected a method that trains an adapter, got method full, on which it is not "
            "defined; take kl, replay or drift",
        )
        self._require(
            form in self.forms,
            f"expected a method that trains {' or '.join(sorted(self.forms))}, got trains: {form}, "
            "on which it would do nothing; leave it out",
        )

    def check_sharding(self, sharding: Sharding) -> None:
        """Refuse a model of which each process holds a part, where it would need the whole.

        Raises:
            TrainingError: Says what to do.
        """
        self._require(
            sharding in self.sharded_by,
            f"expected a model in one piece, got one that {sharding} shards; start it without "
            f"{sharding}, as plain data parallel training, or take kl or replay",
        )

    def train_rows(
        self, rows: Sequence[TokenRow], preserve: PreserveData, seed: int
    ) -> list[TokenRow]:
        """The rows to train on."""
        return list(rows)

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise TrainingError(f"regulariser {self.name}: {message}")

    def _require_positive(self, **values: float) -> None:
        for key, value in values.items():
            self._require(
                0 < value < math.inf, f"{key}: expected a finite number above 0, got {value}"
            )

    def _moments(self, to: Binding) -> SiteMoments:
        moments = to.data.moments
        if moments is None:
            raise TrainingError(
                f"regulariser {self.name}: expected second moments of preserve data, got none; "
                "give preserve_data"
            )
        return moments

    def _rows(self, rows: Sequence[TokenRow]) -> Sequence[TokenRow]:
        if not rows:
            raise TrainingError(
                f"regulariser {self.name}: expected rows of preserve data, got none; give "
                "preserve_data"
            )
        return rows
