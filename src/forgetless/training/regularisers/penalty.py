"""penalty: λ Σ (‖A P‖² + ‖Bᵀ Q‖²) / R, P and Q random orthonormal columns, one for each width.

It keeps the row space of A and the column space of B off two fixed subspaces, whatever the data.

Source: CLoRA, arXiv:2410.16801. Deviations: divided by the rank, so that λ means the same at every
rank. The paper has plain LoRA; of the other forms what trains is penalised (a, b of `both`), which
is 0 at the base, so that the term never pulls away from it.
"""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank of the
# factors, K = columns of P or Q.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from forgetless.adapters.forms import adapted_layers
from forgetless.linalg.precision import full_precision
from forgetless.methods.base import Held
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
    forms: ClassVar[frozenset[Held]] = frozenset({"plain", "a", "b", "both"})  # has A and B

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
                a_RD = layer.lora_A[self._adapter].weight
                b_OR = layer.lora_B[self._adapter].weight
                if a_RD.requires_grad:
                    values.append(self._inside(a_RD, layer.in_features, device))
                if b_OR.requires_grad:
                    values.append(self._inside(b_OR.T, layer.out_features, device))
        return torch.stack(values).sum() * self._options.weight

    def _inside(self, rows_RD: Tensor, width: int, device: torch.device) -> Tensor:
        """Energy of R rows inside the subspace of their width, over R."""
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        inside_RK = rows_RD.to(wide) @ self._bases[width].to(rows_RD.device, wide)
        return inside_RK.square().sum().to(device) / len(rows_RD)
