"""Matrix products of float32 tensors in float32, whatever the caller allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

# Narrower side of the widest problem that is solved in float64, 128 MiB a matrix.
_WIDEST_FLOAT64 = 4096


def solving_dtype(matrix: Tensor) -> torch.dtype:
    """float64 for a matrix of min(rows, columns) <= 4096 where the device has it, else its own.

    For problems whose answer spans more orders of magnitude than float32 tells from zero.
    """
    if min(matrix.shape) <= _WIDEST_FLOAT64 and matrix.device.type != "mps":
        return torch.float64
    return matrix.dtype


def full_precision() -> AbstractContextManager[None]:
    """Inside the block no product of float32 tensors is rounded to TF32 or bf16.

    `torch.set_float32_matmul_precision("high")`, and training with `tf32`, allow that for all of
    a process, on CUDA and in oneDNN on a CPU; the smallest eigenvalues would be lost in it.
    """
    return _precision("ieee")


def products_of_bfloat16() -> AbstractContextManager[None]:
    """Inside the block products of float32 tensors that hold bfloat16 values may be taken as such.

    Multipliers read bfloat16, sums and results are float32: nothing is lost. Of other float32
    values it would lose 16 bits. On a CPU oneDNN does so where it finds AMX; elsewhere it
    multiplies float32.
    """
    return _precision("bf16")


@contextmanager
def _precision(name: str) -> Iterator[None]:
    # torch sets the attribute at run time only.
    onednn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    cuda = torch.backends.cuda.matmul
    before = cuda.fp32_precision, onednn.fp32_precision
    try:
        cuda.fp32_precision = "ieee"
        onednn.fp32_precision = name
        yield
    finally:
        cuda.fp32_precision, onednn.fp32_precision = before
