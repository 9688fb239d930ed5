"""Solved starts (A0, B0 of every layer) on disk, for runs that differ in how they train only.

A file is under a hash of all that the solve reads: the base's fingerprint, the method with its
options, the layers, the second moments and the gradient themselves, the device, and the code of the
solve. So what is taken from it is bit for bit what this machine solved before.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import forgetless.linalg
import forgetless.methods
from forgetless.calibration.engine import SiteMoments
from forgetless.errors import ForgetlessWarning
from forgetless.methods.base import AdapterInit, Method, Role
from forgetless.models.cache import kept
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.placement import input_device
from forgetless.models.targets import Target, base_of
from forgetless.processes import Processes

_FORMAT = "forgetless-starts-1"


class StoredStarts:
    """The file for one solve. What goes wrong with it costs time only."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        method: Method,
        targets: Mapping[str, Target],
        moments: Mapping[Role, SiteMoments],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Find out which file it is; nothing is read yet."""
        state = hashlib.sha256()
        described = [
            _FORMAT,
            torch.__version__,
            _code(),
            model_fingerprint(model),
            input_device(base_of(model)).type,
            method.name,
            asdict(method),
            sorted(targets),
        ]
        state.update(json.dumps(described).encode())
        for role in sorted(method.needs):
            _add_moments(state, role, moments[role])
        for name in sorted(gradients):
            state.update(f"\0gradient {name}\0".encode())
            state.update(_bytes(gradients[name]))
        self.path = folder / f"starts-{state.hexdigest()[:16]}.safetensors"

    def kept(
        self, solve: Callable[[], dict[str, AdapterInit]], processes: Processes
    ) -> dict[str, AdapterInit]:
        """Starts by layer: from the file, or solved and kept."""
        return kept(self.path, take=self._take, make=solve, put=self._put, processes=processes)

    def _take(self) -> dict[str, AdapterInit] | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                layers = json.loads((file.metadata() or {})["layers"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if any(facts["sha256"] != _digest(name, tensors) for name, facts in layers.items()):
                raise ValueError("its bytes are not those that were written")
            return {
                name: AdapterInit(tensors[f"{name}/a"], tensors[f"{name}/b"], facts["diagnostics"])
                for name, facts in layers.items()
            }
        # What reading fails with where bytes of the header or of its JSON are others.
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._warn(f"cannot be used ({reason}); the starts are solved again")
            return None

    def _put(self, found: Mapping[str, AdapterInit]) -> None:
        tensors = {}
        for name, init in found.items():
            tensors[f"{name}/a"] = init.a_RD.detach().cpu().contiguous()
            tensors[f"{name}/b"] = init.b_OR.detach().cpu().contiguous()
        layers = {
            name: {"sha256": _digest(name, tensors), "diagnostics": dict(init.diagnostics)}
            for name, init in found.items()
        }
        half = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, half, {"layers": json.dumps(layers)})
            half.replace(self.path)
        except (SafetensorError, OSError) as error:  # either, where the disk is full
            self._warn(f"cannot be written ({error}); the next run solves again")
        finally:
            half.unlink(missing_ok=True)

    def _warn(self, problem: str) -> None:
        warnings.warn(f"starts: {self.path} {problem}", ForgetlessWarning, stacklevel=4)


def _code() -> str:
    """Hash of the code that solves: with another version of it nothing of before is taken."""
    state = hashlib.sha256()
    for package in (forgetless.linalg, forgetless.methods):
        for folder in package.__path__:
            for file in sorted(Path(folder).glob("*.py")):
                state.update(file.read_bytes())
    return state.hexdigest()


def _add_moments(state: hashlib._Hash, role: Role, moments: SiteMoments) -> None:
    state.update(f"\0{role} {json.dumps(moments.site_of, sort_keys=True)}".encode())
    for site in sorted(moments.moments):
        moment = moments.moments[site]
        state.update(f"\0{site} {moment.num_tokens} {moment.num_samples}\0".encode())
        state.update(_bytes(moment.lower_DD))
        state.update(_bytes(moment.sum_D))


def _digest(name: str, tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for part in ("a", "b"):
        state.update(_bytes(tensors[f"{name}/{part}"]))
    return state.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous()
    data: memoryview = plain.reshape(-1).view(torch.uint8).numpy().data
    return data
