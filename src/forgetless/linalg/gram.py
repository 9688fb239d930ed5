"""Add xᵀ x to a running sum: half of the products, none of them rounded below float32.

xᵀ x is symmetric, so only blocks on and below the diagonal are formed. Which routine forms them
depends on the device and on the dtype of x:

- bfloat16 on a CPU that multiplies it: the product of two bfloat16 numbers is exact in float32, so
  bfloat16 multipliers with float32 sums lose nothing
- float32 on a CPU with AVX-512 and without AMX: oneDNN takes the same request for bfloat16
  multipliers, and answers with float32 ones, for it has no others there. That is asked of it once,
  not assumed. It is worth it: MKL's, which full precision gets, take 1.1 to 1.2 times as long
- bfloat16 and float16 on CUDA: the same, with a float32 result; tensor cores cut off what a running
  sum cannot hold in place of rounding it, so that 2048 tokens at a time keep the error of a sum
  near 5e-6 (8192 at a time: 3e-5), and the float32 sum takes those
- everything else: widened, in full precision
"""

# Shape letters: T = tokens, N = tokens of a chunk, D = layer input width, P = width of a panel.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor

from forgetless.linalg.precision import full_precision, products_of_bfloat16

_CHUNK = 2**22  # numbers that are widened at a time: a copy of 16 MiB
_TENSOR_CORE_TOKENS = 2048  # that one product of 16-bit factors sums up on CUDA
_NARROWEST_PANEL = {"cpu": 192, "cuda": 1024}  # narrower ones take longer than the half they save
_FLOAT32_ERROR = 2e-6  # relative, of a product at most; bfloat16 factors leave 6e-5
_EXACT_IN_BFLOAT16 = ("amx_bf16", "avx512_bf16")  # in torch.cpu.get_capabilities()


def add_gram_(lower_DD: Tensor, sum_D: Tensor, x_TD: Tensor) -> None:
    """Add xᵀ x to the lower triangle of a sum, and the rows of x to another.

    Args:
        lower_DD: float32 or wider. What stands above the diagonal is undefined afterwards.
        sum_D: The same dtype.
        x_TD: Any float dtype that the sums' dtype holds; T may be 0.
    """
    add_panels_, precision = _routine(x_TD, lower_DD)
    most = _tokens_at_a_time(x_TD)
    with precision():
        for x_ND in torch.tensor_split(x_TD, -(-len(x_TD) // most)) if len(x_TD) else ():
            add_panels_(lower_DD, sum_D, x_ND)


def _tokens_at_a_time(x_TD: Tensor) -> int:
    if x_TD.device.type == "cpu":
        return max(_CHUNK // x_TD.shape[1], 256)
    return _TENSOR_CORE_TOKENS if x_TD.dtype.itemsize == 2 else len(x_TD)


_AddPanels = Callable[[Tensor, Tensor, Tensor], None]
_Precision = Callable[[], AbstractContextManager[None]]


def _routine(x_TD: Tensor, lower_DD: Tensor) -> tuple[_AddPanels, _Precision]:
    kind, single = x_TD.device.type, lower_DD.dtype == torch.float32
    if single and kind == "cuda" and x_TD.dtype.itemsize == 2:
        return _add_narrow, full_precision
    if single and kind == "cpu":
        exact = x_TD.dtype == torch.bfloat16 and _multiplies_bfloat16()
        if exact or _multiplies_float32_anyway():
            return _add_widened, products_of_bfloat16
    return _add_widened, full_precision


def _add_widened(lower_DD: Tensor, sum_D: Tensor, x_ND: Tensor) -> None:
    x_ND = x_ND.to(lower_DD.dtype)
    sum_D.add_(x_ND.sum(0))
    for rows, columns in _panels(lower_DD):
        lower_DD[rows, columns].addmm_(x_ND[:, rows].T, x_ND[:, columns])


def _add_narrow(lower_DD: Tensor, sum_D: Tensor, x_ND: Tensor) -> None:
    """Factors of 16 bits, a result of 32."""
    sum_D.add_(x_ND.sum(0, dtype=sum_D.dtype))
    for rows, columns in _panels(lower_DD):
        block = lower_DD[rows, columns]
        torch.addmm(block, x_ND[:, rows].T, x_ND[:, columns], out_dtype=lower_DD.dtype, out=block)


def _panels(lower_DD: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that cover the lower triangle: 9/16 of a wide square."""
    D = lower_DD.shape[0]
    P = max(D // 8, _NARROWEST_PANEL.get(lower_DD.device.type, 192))
    for start in range(0, D, P):
        stop = min(start + P, D)
        yield slice(start, stop), slice(0, stop)


@cache
def _multiplies_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in _EXACT_IN_BFLOAT16)


@cache
def _multiplies_float32_anyway() -> bool:
    """Whether float32 products are as good as in full precision where bfloat16 may be taken."""
    found = torch.cpu.get_capabilities()
    if not found.get("avx512_f") or found.get("amx_bf16"):
        return False
    N, D = 2048, 2 * _NARROWEST_PANEL["cpu"]
    x_ND = torch.arange(N * D, dtype=torch.float64, device="cpu").sin().reshape(N, D).float()
    lower_DD, sum_D = torch.zeros(D, D, device="cpu"), torch.zeros(D, device="cpu")
    with products_of_bfloat16():
        _add_widened(lower_DD, sum_D, x_ND)
    exact_DD = (x_ND.T.double() @ x_ND.double()).tril()
    return bool((lower_DD.tril() - exact_DD).norm() < _FLOAT32_ERROR * exact_DD.norm())
