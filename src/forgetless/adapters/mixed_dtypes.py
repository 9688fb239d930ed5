"""Adapters of which a trainer has cast one side only.

TRL casts the trainable parameters of quantised models to bfloat16 and leaves the frozen ones, in a
user's own script too, where nobody aligns them afterwards (`forms.align_adapter_dtype`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def in_dtype_of_weight(module: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of a linear layer: its input in the dtype of its weight.

    Under autocast the operator casts by itself; nothing is done there, and where the dtypes agree.
    """
    x, *rest = args
    if x.dtype == module.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return None
    return (x.to(module.weight.dtype), *rest)
