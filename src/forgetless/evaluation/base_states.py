"""The base's last hidden states at scored positions, kept on disk.

KL needs the base's whole distribution at every scored token: too much to keep, but the head makes
it again, bit for bit, from a hidden state that is a hundred times smaller. So a base that was
measured once costs later runs its head alone, not a forward pass.
"""

# Shape letters in this file: N = scored positions of a batch, H = hidden width.

from __future__ import annotations

import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetless.atomic import replace_with
from forgetless.errors import ForgetlessWarning

LARGEST = 2**28  # bytes of one file; larger sets are computed each time


class BaseStates:
    """Hidden states of one set of rows, batch by batch: read where they are kept, else gathered.

    A context manager: what was gathered is written where the block ends without an error. What goes
    wrong with the file costs time only.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the file where there is one. None: nothing is kept."""
        self._path = path
        self._stored: dict[str, Tensor] = {}
        self._gathered: dict[str, Tensor] = {}
        self._bytes = 0
        if path is None or not path.exists():
            return
        try:
            self._stored = load_file(path)
        except (SafetensorError, OSError) as error:
            self._warn(f"cannot be used ({error}); the base's states are computed again")

    def __enter__(self) -> Self:
        """Nothing to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what was gathered."""
        if self._path is None or kind is not None or not self._gathered or self._bytes > LARGEST:
            return
        try:
            states = self._stored | self._gathered
            replace_with(self._path, lambda temporary: save_file(states, temporary))
        except (SafetensorError, OSError) as failure:
            self._warn(f"cannot be written ({failure}); the next evaluation computes them again")

    def of(self, batch: int, positions: int) -> Tensor | None:
        """States (N, H) of a batch; None where they are not kept."""
        hidden_NH = self._stored.get(str(batch))
        if hidden_NH is None or len(hidden_NH) != positions:
            return None
        # A copy is aligned as the forward pass's own is, and the head's sums end in the same bits.
        return hidden_NH.clone()

    def keep(self, batch: int, hidden_NH: Tensor) -> None:
        """Gather a batch's states, unless all of them are more than a file may hold."""
        self._bytes += hidden_NH.nbytes
        if self._path is None:
            return
        if self._bytes > LARGEST:
            self._gathered.clear()
        else:
            self._gathered[str(batch)] = hidden_NH.detach().cpu().contiguous()

    def _warn(self, problem: str) -> None:
        warnings.warn(f"base cache: {self._path} {problem}", ForgetlessWarning, stacklevel=3)
