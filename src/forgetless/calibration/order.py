"""In which order a forward pass calls its target layers, and which of them read the same tensor."""

# Shape letters in this file: B = rows, T = positions.

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from forgetless.calibration.hooks import observe_sites
from forgetless.models.placement import input_device
from forgetless.models.targets import Target, base_of


@dataclass(frozen=True, slots=True)
class CallOrder:
    """What a pass over one token showed.

    Attributes:
        calls: Targets in the order of their calls; one may be called several times, or never.
        site_of: Target name to the first target that reads the same tensor.
    """

    calls: tuple[str, ...]
    site_of: dict[str, str]

    def of(self, targets: Container[str]) -> tuple[str, ...]:
        """The calls of some of the targets."""
        return tuple(name for name in self.calls if name in targets)


def find_call_order(
    model: nn.Module, decoder: nn.Module, targets: Mapping[str, Target]
) -> CallOrder:
    """Run one token through the base.

    Args:
        model: The model that `decoder` belongs to.
        decoder: What `base_forward` yields; inside its block.
        targets: Layers to look at.
    """
    base = base_of(model)
    token_BT = torch.zeros(1, 1, dtype=torch.int64, device=input_device(base))
    second = {"decoder_input_ids": token_BT} if base.config.is_encoder_decoder else {}
    with observe_sites(model, targets, lambda _site, _x: None) as sites:
        decoder(
            input_ids=token_BT, attention_mask=torch.ones_like(token_BT), use_cache=False, **second
        )
        return CallOrder(tuple(sites.calls), dict(sites.site_of))
