"""project: after each optimiser step, the update of a trained A is projected off preserve inputs.

U spans the directions that hold `energy` of the preserve second moment; A ← A + (A' − A)(I − U Uᵀ).
What A read of preserve data at its start stays; nothing is added, whatever Adam does.

Source: null-space gradient projection (GuardSpace, arXiv:2510.14301; AlphaEdit, arXiv:2410.02355).
Deviation: the optimiser's update is projected, not the gradient, so that Adam's per-entry scaling
and weight decay cannot lead back in.
"""

# Shape letters in this file: D = layer input width, R = rank, K = directions kept clean.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from forgetless.adapters.forms import adapted_layers
from forgetless.linalg.precision import full_precision
from forgetless.linalg.subspace import leading_basis
from forgetless.methods.base import Held
from forgetless.training.regularisers.base import Binding, Regulariser, Term


@dataclass(frozen=True, kw_only=True)
class Project(Regulariser):
    """Projection of A's updates.

    Attributes:
        energy: Share of the preserve energy that U holds, layer by layer.
    """

    energy: float = 0.99

    name: ClassVar[str] = "project"
    title: ClassVar[str] = "each update of A projected off preserve inputs"
    paper: ClassVar[str] = "after GuardSpace, arXiv:2510.14301"
    needs_moments: ClassVar[bool] = True
    forms: ClassVar[frozenset[Held]] = frozenset({"plain", "a", "both"})  # those that train A

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(
            0 < self.energy < 1, f"energy: expected a number between 0 and 1, got {self.energy}"
        )

    def bind(self, to: Binding) -> Term:
        """Solve for U, once per site."""
        moments = self._moments(to)
        bases: dict[tuple[str, torch.device], Tensor] = {}
        pairs = []
        for name, layer in adapted_layers(to.model, to.adapter).items():
            weight_RD = layer.lora_A[to.adapter].weight
            place = moments.site_of[name], weight_RD.device
            if place not in bases:
                basis_DK = leading_basis(moments.of(name).mean_DD(), self.energy)
                bases[place] = basis_DK.to(weight_RD.device)
            pairs.append((weight_RD, bases[place]))
        return _ProjectTerm(pairs)


class _ProjectTerm(Term):
    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs
        self._before: list[Tensor] = []

    def before_step(self) -> None:
        """Remember every A."""
        self._before = [weight_RD.detach().clone() for weight_RD, _ in self._pairs]

    def after_step(self) -> None:
        """Take out of every update what lies in U."""
        with torch.no_grad(), full_precision():
            for (weight_RD, basis_DK), before_RD in zip(self._pairs, self._before, strict=True):
                update_RD = (weight_RD - before_RD).to(basis_DK)
                weight_RD.sub_(((update_RD @ basis_DK) @ basis_DK.T).to(weight_RD))
        self._before = []
