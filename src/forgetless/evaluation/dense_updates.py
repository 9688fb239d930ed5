"""ΔW = W' - W of every linear layer of a tuned pair, and what moved besides."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rows of C,
# P = numerical rank of ΔW.

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetless.errors import ForgetlessWarning
from forgetless.linalg.lowrank import core_and_row_space
from forgetless.models.pair import TunedPair, own_tensors
from forgetless.models.targets import Target, find_targets


@dataclass(frozen=True, slots=True)
class DenseUpdate:
    """One layer's.

    Attributes:
        target: The layer in the base.
        core_RD: C, with ‖C x‖ = ‖ΔW x‖.
        basis_DP: Orthonormal basis of the row space of ΔW, as far as it stands out of the rounding
            of W': that of a merged LoRA of rank r is again r directions, where all of them do.
    """

    target: Target
    core_RD: Tensor
    basis_DP: Tensor


def dense_updates(pair: TunedPair) -> dict[str, DenseUpdate]:
    """Every linear layer below the head, moved or not; one SVD a layer.

    Warns:
        ForgetlessWarning: Other tensors have moved as well.
    """
    base, tuned = (find_targets(model).targets for model in (pair.base, pair.tuned))
    found = {name: _update(target, tuned[name]) for name, target in base.items()}
    _warn_of_others(pair, set(found))
    return found


def _update(target: Target, tuned: Target) -> DenseUpdate:
    new_OD = tuned.weight_OD()
    # The difference itself, and the solve, must not add to the rounding of what is stored.
    wide = torch.float32 if new_OD.device.type == "mps" else torch.float64
    delta_OD = new_OD.to(wide) - target.weight_OD().to(wide)
    core_RD, basis_DP = core_and_row_space(delta_OD, _rounding_norm(new_OD, delta_OD))
    return DenseUpdate(target, core_RD.to(new_OD), basis_DP.to(new_OD))


def _rounding_norm(new_OD: Tensor, delta_OD: Tensor) -> float:
    """Spectral norm that rounding can have added to ΔW. The base is exact: it is what it is.

    Errors of storing are like independent draws, uniform within half a spacing, so that their
    matrix has the norm σ (√O + √D) of random matrices; twice that leaves room for those of the
    product and the sum before.
    """
    eps = max(torch.finfo(dtype).eps for dtype in _exact_dtypes(new_OD))
    # |w| = m 2^e with m in [1/2, 1): neighbours are 2^(e - 1) eps apart.
    size_OD = new_OD.float().abs() + delta_OD.float().abs()
    spacing_OD = eps * torch.exp2(torch.frexp(size_OD).exponent.float() - 1) * (size_OD > 0)
    sigma = float(spacing_OD.square().mean().div(12).sqrt())
    return 2 * sigma * sum(math.sqrt(width) for width in new_OD.shape)


def _exact_dtypes(weight_OD: Tensor) -> list[torch.dtype]:
    """Types that hold every entry: a model merged in bfloat16 may have been loaded in float32."""
    return [weight_OD.dtype] + [
        dtype
        for dtype in (torch.bfloat16, torch.float16)
        if torch.equal(weight_OD.to(dtype).to(weight_OD.dtype), weight_OD)
    ]


def _warn_of_others(pair: TunedPair, layers: set[str]) -> None:
    """Norms, embeddings, biases and the head are in no figure of movement."""
    base, moved = own_tensors(pair.base), {}
    for name, tensor in own_tensors(pair.tuned).items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in layers:
            continue
        apart = (tensor.detach().float() - base[name].detach().float()).norm()
        if float(apart) > 0:
            moved[name] = float(apart / base[name].detach().float().norm().clamp_min(1e-30))
    if not moved:
        return
    most = max(moved, key=lambda name: moved[name])
    what = "1 tensor" if len(moved) == 1 else f"{len(moved)} tensors"
    warnings.warn(
        f"movement: {what} besides the weights of linear layers moved as well (embeddings, norms, "
        f"biases, the head), {most} most, by {moved[most]:.2g} of its norm; update size, drift and "
        "leakage do not hold them",
        ForgetlessWarning,
        stacklevel=4,
    )
