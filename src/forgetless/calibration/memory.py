"""Whether second moments fit into memory, known before the pass that fills them."""

# Shape letter in this file: D = width of a site.

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from forgetless.calibration.hooks import observe_sites
from forgetless.errors import CalibrationError
from forgetless.models.hardware import GIB, free_memory
from forgetless.models.targets import Target, base_of


def refuse_beyond_memory(
    model: nn.Module, decoder: nn.Module, targets: Mapping[str, Target]
) -> None:
    """Refuse targets whose moments take more than is free where the model lies.

    Which targets share a site is not known before a forward pass: where one site a target would be
    too much, a pass over one token tells.

    Args:
        model: The model that `decoder` belongs to.
        decoder: What `base_forward` yields; inside its block.
        targets: Layers whose inputs are wanted.

    Raises:
        CalibrationError: States what is needed and what is free.
    """
    base = base_of(model)
    free = free_memory(base.device)
    if moment_bytes(targets, list(targets), base.dtype) <= free:
        return
    with observe_sites(model, targets, lambda _site, _x: None) as sites:
        token_BT = torch.zeros(1, 1, dtype=torch.int64, device=base.device)
        second = {"decoder_input_ids": token_BT} if base.config.is_encoder_decoder else {}
        decoder(input_ids=token_BT, use_cache=False, **second)
    names = sorted(set(sites.site_of.values()))
    needed = moment_bytes(targets, names, base.dtype)
    if needed > free:
        widest = max(names, key=lambda name: targets[name].in_features)
        raise CalibrationError(
            f"calibration: expected {needed / GIB:.3g} GiB of free memory for the moments of "
            f"{len(names)} sites, got {free / GIB:.3g} GiB on {base.device.type}; name fewer "
            f"layers in targets, first of all not {widest.rpartition('.')[2]}, which is "
            f"{targets[widest].in_features} wide"
        )


def moment_bytes(targets: Mapping[str, Target], sites: list[str], dtype: torch.dtype) -> int:
    """Bytes of the moments of `sites`, each named after a target: D² + D numbers."""
    size = torch.promote_types(dtype, torch.float32).itemsize
    widths = [targets[site].in_features for site in sites]
    return sum(size * width * (width + 1) for width in widths)
