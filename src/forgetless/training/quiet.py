"""What the libraries warn each other of is not for our users: they could do nothing about it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = r"(torch|transformers|trl|peft|accelerate|datasets|huggingface_hub)(\.|$)"


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Inside the block, warnings raised in the libraries' own code are dropped."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
        yield
