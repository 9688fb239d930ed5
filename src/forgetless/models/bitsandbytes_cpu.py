"""Hold 4-bit weights of bitsandbytes in the one layout that is exact and lets gradients through.

On CPUs with AVX512-BF16, `Linear4bit` repacks its weight in the first forward pass in eval mode.
The packed layout rounds the scales of the blocks to bfloat16, so that the base is no longer what it
was; its kernel has no backward, so that after one evaluation no gradient reaches the layers below;
and the way back, taken by `state_dict()`, leaves the scales transposed. (bitsandbytes 0.50.2.)

The switch and the way back are no public API of bitsandbytes: pyproject.toml takes one minor
release, and what another one lacks is said, not made up.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn

from forgetless.errors import ForgetlessWarning, ModelError

SWITCH = "support_avx512bf16_for_cpu"
WAY_BACK = "_convert_weight_packed_for_cpu_inverse"


def keep_trainable_layout(model: nn.Module) -> None:
    """Keep the 4-bit layers of a model from being repacked; lay out anew those that have been.

    What a repacked layer computed is kept: its scales stay those that were rounded. Layers of a
    release without the switch are left alone, with a warning where they are on a CPU.

    Raises:
        ModelError: A layer was repacked, and this release of bitsandbytes has no way back.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # no such layer can be there
        return
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        if SWITCH in vars(layer):
            setattr(layer, SWITCH, False)
        _unpack(bitsandbytes, layer)
    without = [m for m in layers if SWITCH not in vars(m) and m.weight.device.type == "cpu"]
    if without:
        warnings.warn(
            f"bitsandbytes {bitsandbytes.__version__}: {len(without)} 4-bit layers have no switch "
            f"{SWITCH}; if this release repacks them on a CPU, an evaluated model no longer "
            "trains; install a release that forgetless[quantized] names",
            ForgetlessWarning,
            stacklevel=3,
        )


def misread_layers(model: nn.Module) -> list[str]:
    """Names of 4-bit layers on a CPU whose rows are no whole number of blocks.

    bitsandbytes 0.50.2 stores them well and reads them as if each row began a block: the layer
    computes with other weights than the codes and scales stand for, and than a GPU would.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return []
    found = []
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.weight.device.type == "cpu":
            state: Any = module.weight.quant_state
            if state is not None and state.shape[-1] % state.blocksize:
                found.append(name)
    return found


def _unpack(bitsandbytes: Any, layer: Any) -> None:
    weight = layer.weight
    state = weight.quant_state
    if state is None or not vars(state).get("packing_format_for_cpu", False):
        return
    if not hasattr(bitsandbytes.functional, WAY_BACK):
        raise ModelError(
            f"bitsandbytes {bitsandbytes.__version__}: expected {WAY_BACK}, to lay out repacked "
            "4-bit weights anew, found none; install a release that forgetless[quantized] names, "
            "or load the model anew and do not run it before"
        )
    # Scales that were quantised themselves are plain numbers in a packed layer, and stay so.
    state.original_nested = False
    weight.data, state = getattr(bitsandbytes.functional, WAY_BACK)(weight.data, state)
    # (K / block, N) in the packed layout, N-major in this one.
    state.absmax = state.absmax.T.reshape(-1).float()
    weight.quant_state = layer.quant_state = state
