"""Hold 4-bit weights of bitsandbytes in the one layout that is exact and lets gradients through.

On CPUs with AVX512-BF16, `Linear4bit` repacks its weight in the first forward pass in eval mode.
The packed layout rounds the scales of the blocks to bfloat16, so that the base is no longer what it
was; its kernel has no backward, so that after one evaluation no gradient reaches the layers below;
and the way back, taken by `state_dict()`, leaves the scales transposed. (bitsandbytes 0.50.2.)
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def keep_trainable_layout(model: nn.Module) -> None:
    """Keep the 4-bit layers of a model from being repacked; lay out anew those that have been.

    What a repacked layer computed is kept: its scales stay those that were rounded.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # no such layer can be there
        return
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            _unpack(bitsandbytes, module)


def _unpack(bitsandbytes: Any, layer: Any) -> None:
    layer.support_avx512bf16_for_cpu = False
    weight = layer.weight
    state = weight.quant_state
    if state is None or not vars(state).get("packing_format_for_cpu", False):
        return
    # Scales that were quantised themselves are plain numbers in a packed layer, and stay so.
    state.original_nested = False
    weight.data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(
        weight.data, state
    )
    # (K / block, N) in the packed layout, N-major in this one.
    state.absmax = state.absmax.T.reshape(-1).float()
    weight.quant_state = layer.quant_state = state
