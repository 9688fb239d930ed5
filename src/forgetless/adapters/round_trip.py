"""Reload what was written, and compare its logits with those of the live adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from forgetless.adapters.load import load_adapter, removal
from forgetless.adapters.scale import scaled_adapter
from forgetless.errors import AdapterError
from forgetless.models.state import left_as_found
from forgetless.models.targets import base_of

PROBE = "forgetless-roundtrip"
# Largest difference of logits, as a share of the largest logit, that rounding may explain.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_16_BIT = 5e-2


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Logits of the exported adapter, reloaded by PEFT, against the live one on the same base.

    Attributes:
        max_difference: Largest absolute difference of logits.
        max_logit: Largest absolute logit, for scale.
    """

    max_difference: float
    max_logit: float

    @classmethod
    def of(cls, live: Tensor, found: Tensor, dtype: torch.dtype, where: str) -> RoundTrip:
        """Compare logits.

        Args:
            live: Logits of the live adapter.
            found: Logits of what was written, on the same input.
            dtype: The coarsest in which either was computed.
            where: Begins the message.

        Raises:
            AdapterError: They differ by more than rounding in `dtype` explains.
        """
        difference = float((live.float() - found.float()).abs().max())
        largest = float(live.float().abs().max())
        share = TOLERANCE_16_BIT if dtype.itemsize < 4 else TOLERANCE_FLOAT32
        if not difference <= share * largest:  # NaN must not pass
            raise AdapterError(
                f"{where}: expected the logits of the live adapter up to {share * largest:.2e}, "
                f"got a difference of {difference:.2e}; do not use it, and report this"
            )
        return cls(difference, largest)


def check_round_trip(
    model: PeftModel,
    folder: Path | str,
    input_ids_BT: Tensor,
    *,
    scale: float = 1.0,
    adapter: str = "default",
) -> RoundTrip:
    """Reload an export beside the live adapter and compare logits on the same input.

    The model is left as it was found.

    Raises:
        AdapterError: The logits differ by more than rounding explains.
    """
    dtype = _coarsest_dtype(base_of(model))
    with left_as_found(model), torch.no_grad():
        model.eval()
        model.set_adapter(adapter)
        with scaled_adapter(model, scale, adapter):
            live = model(input_ids=input_ids_BT, use_cache=False).logits
        remove = removal(model, PROBE)  # an export may wrap layers that the live adapter does not
        load_adapter(model, folder, adapter=PROBE)
        try:
            exported = model(input_ids=input_ids_BT, use_cache=False).logits
        finally:
            model.set_adapter(adapter)  # PEFT warns of deleting the active one
            remove()
    return RoundTrip.of(live, exported, dtype, f"export: {folder}")


def _coarsest_dtype(base: PreTrainedModel) -> torch.dtype:
    """Of all parameters: that of quantised weights where there are some."""
    return min((p.dtype for p in base.parameters()), key=lambda dtype: dtype.itemsize)
