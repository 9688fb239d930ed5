"""The regularisers of one training at work: their losses added up, their steps called, logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.training.regularisers.base import MicroBatch, Term

LOGGED = "loss_"  # before a regulariser's name


class TermsAtWork(TrainerCallback):
    """Bound regularisers, by name; false where there are none."""

    def __init__(self, terms: Mapping[str, Term]) -> None:
        """Take them as they are at step 0, or at the step that training goes on from."""
        self._terms = terms
        self._micro = MicroBatch(step=-1, index=0, count=1, stride=1)
        # Projections and mixed rows add nothing to the loss: there is nothing to log of them.
        self._logged = [name for name, term in terms.items() if type(term).loss is not Term.loss]
        self._sums: dict[str, float] = dict.fromkeys(self._logged, 0.0)
        self._steps = 0

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._terms)

    def loss(self, model: nn.Module, step: int, count: int, stride: int) -> Tensor:
        """The sum of all terms' shares of one forward pass.

        Args:
            model: The adapted model as the trainer has wrapped it.
            step: Optimiser steps taken before.
            count: Forward passes of this step.
            stride: Forward passes of a whole step.
        """
        index = self._micro.index + 1 if step == self._micro.step else 0
        self._micro = MicroBatch(step=step, index=index, count=count, stride=stride)
        total = torch.zeros((), device=next(model.parameters()).device)
        for name, term in self._terms.items():
            value = term.loss(model, self._micro)
            if value is not None:
                self._sums[name] += float(value.detach())
                total = total + value
        return total

    def means(self) -> dict[str, float]:
        """Mean of each term over the optimiser steps since this was last asked for."""
        found = {f"{LOGGED}{name}": s / max(self._steps, 1) for name, s in self._sums.items()}
        self._sums, self._steps = dict.fromkeys(self._logged, 0.0), 0
        return found

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the optimiser moves anything."""
        for term in self._terms.values():
            term.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After it has."""
        self._steps += 1
        for term in self._terms.values():
            term.after_step()
