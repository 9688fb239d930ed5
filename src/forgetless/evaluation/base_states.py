"""The base's last hidden states at scored positions, kept on disk.

KL needs the base's whole distribution at every scored token: too much to keep, but the head makes
it again, bit for bit, from a hidden state that is a hundred times smaller. So a base that was
measured once costs later runs its head alone, not a forward pass.
"""

# Shape letters in this file: N = scored positions of a batch, H = hidden width.

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetless.atomic import replace_with
from forgetless.errors import ForgetlessWarning
from forgetless.models.cache import made_by_one

LARGEST = 2**28  # bytes of one file; larger sets are computed each time


class BaseStates:
    """Hidden states of one set of rows, batch by batch: read where they are kept, else gathered.

    A context manager: what was gathered is written where the block ends without an error. Of
    several processes one gathers; the others wait for it, and read. What goes wrong with the file
    costs time only.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the file where there is one. None: nothing is kept."""
        self._path = path
        self._stored: dict[str, Tensor] = {}
        self._gathered: dict[str, Tensor] = {}
        self._bytes, self._is_whole = 0, True
        self._held = ExitStack()
        self._read()

    def __enter__(self) -> Self:
        """Keep other processes from gathering the same, where there is something to gather."""
        if not self._stored:
            was_there = self._path is not None and self._path.exists()
            self._held.enter_context(made_by_one(self._path))
            if not was_there:
                self._read()
        return self

    def _read(self) -> None:
        if self._path is None or not self._path.exists():
            return
        try:
            self._stored = load_file(self._path)
        except (SafetensorError, OSError) as error:
            self._warn(f"cannot be used ({error}); the base's states are computed again")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what was gathered."""
        with self._held:
            if kind is None and self._gathered and self._is_whole:
                self._write()

    def _write(self) -> None:
        assert self._path is not None, "nothing is gathered for no file"
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

    def keep(self, batch: int, hidden_NH: Tensor | None) -> None:
        """Gather a batch's states, unless it has none or all are more than a file may hold."""
        self._bytes += 0 if hidden_NH is None else hidden_NH.nbytes
        self._is_whole &= hidden_NH is not None and self._bytes <= LARGEST
        if self._path is None:
            return
        if hidden_NH is None or not self._is_whole:
            self._gathered.clear()
            self._held.close()  # nothing will be written: nobody need wait for it
        else:
            self._gathered[str(batch)] = hidden_NH.detach().cpu().contiguous()

    def _warn(self, problem: str) -> None:
        warnings.warn(f"base cache: {self._path} {problem}", ForgetlessWarning, stacklevel=3)
