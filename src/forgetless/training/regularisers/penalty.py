"""penalty: λ Σ (‖A P‖² + ‖Bᵀ Q‖²) / R, P and Q random orthonormal columns, one for each width.

It keeps the row space of A and the column space of B off two fixed subspaces, whatever the data.
For the form `both`, A and B are the factors of ΔW that an export holds.

Source: CLoRA, arXiv:2410.16801. Deviation: divided by the rank of the factors, so that λ
means the same at every rank.
"""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank of the
# factors, K = columns of P or Q.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from forgetless.adapters.forms import adapted_layers, live_factors
from forgetless.linalg.precision import full_precision
from forgetless.training.regularisers.base import Binding, MicroBatch, Regulariser, Term


@dataclass(frozen=True, kw_only=True)
class Penalty(Regulariser):
    """Subspace penalty.

    Attributes:
        weight: λ.
        share: Columns of P and Q, as a share of the width.
    """

    weight: float = 1.0
    share: float = 0.5

    name: ClassVar[str] = "penalty"
    title: ClassVar[str] = "A and B kept off fixed random subspaces"
    paper: ClassVar[str] = "CLoRA, arXiv:2410.16801"

    def __post_init__(self) -> None:
        """Check the options."""
        self._require_positive(weight=self.weight)
        self._require(
            0 < self.share < 1, f"share: expected a number between 0 and 1, got {self.share}"
        )

    def bind(self, to: Binding) -> Term:
        """Draw P and Q, seeded by their width."""
        return _PenaltyTerm(self, to)

    def basis(self, width: int, seed: int) -> Tensor:
        """(width, K) orthonormal columns, float32."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + width) % 2**63)
        count = max(1, round(width * self.share))
        drawn = torch.randn(width, count, generator=generator, dtype=torch.float64)
        basis_DK: Tensor = torch.linalg.qr(drawn).Q
        return basis_DK.float()


class _PenaltyTerm(Term):
    def __init__(self, options: Penalty, to: Binding) -> None:
        self._options = options
        self._adapter = to.adapter
        self._layers = list(adapted_layers(to.model, to.adapter).values())
        widths = {w for layer in self._layers for w in (layer.in_features, layer.out_features)}
        self._bases = {width: options.basis(width, to.seed) for width in sorted(widths)}

    def loss(self, model: nn.Module, micro: MicroBatch) -> Tensor | None:
        """Of the weights alone, so once a step."""
        if micro.index:
            return None
        device = next(model.parameters()).device
        self._bases = {width: basis.to(device) for width, basis in self._bases.items()}
        values = []
        with torch.autocast(device.type, enabled=False), full_precision():
            for layer in self._layers:
                a_RD, b_OR = live_factors(layer, self._adapter)
                read = a_RD @ self._bases[layer.in_features].to(a_RD)
                written = b_OR.T @ self._bases[layer.out_features].to(b_OR)
                inside = read.square().sum() + written.square().sum()
                values.append(inside.to(device) / len(a_RD))
        return torch.stack(values).sum() * self._options.weight
