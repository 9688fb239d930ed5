"""Matrix products of float32 tensors in float32, whatever the caller allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside the block no product of float32 tensors is rounded to TF32 or bf16.

    `torch.set_float32_matmul_precision("high")`, and training with `tf32`, allow that for all of
    a process, on CUDA and in oneDNN on a CPU; the smallest eigenvalues would be lost in it.
    """
    # torch sets the attribute at run time only.
    onednn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backends = (torch.backends.cuda.matmul, onednn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
