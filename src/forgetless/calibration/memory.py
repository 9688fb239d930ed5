"""Whether second moments fit into memory, known before the pass that fills them."""

# Shape letter in this file: D = width of a site.

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from forgetless.calibration.order import CallOrder
from forgetless.errors import CalibrationError
from forgetless.models.hardware import GIB, free_memory
from forgetless.models.targets import Target


def refuse_beyond_memory(
    base: PreTrainedModel, targets: Mapping[str, Target], order: CallOrder
) -> None:
    """Refuse targets whose moments take more than is free where the model lies.

    Raises:
        CalibrationError: States what is needed and what is free.
    """
    free = free_memory(base.device)
    names = sorted({order.site_of[name] for name in targets if name in order.site_of})
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
