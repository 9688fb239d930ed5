"""The updates that an export writes: factors by layer, all scales folded in."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

from torch import Tensor, nn

from forgetless.adapters.export_target import ExportJob
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.errors import AdapterError
from forgetless.models.targets import base_of

# A (R, D) and B (O, R) with ΔW = B A, by the layer's name in the base.
Updates = dict[str, tuple[Tensor, Tensor]]


def base_name_of(job: ExportJob) -> str | None:
    """The base as the user named it, or as it names itself."""
    return job.base_name or base_of(job.model).config.name_or_path or None


def updates_to_write(job: ExportJob) -> Updates:
    """A and B of every layer, all scales folded into B.

    Raises:
        AdapterError: NaN or inf.
    """
    found: Updates = {}
    for name, layer in adapted_layers(job.model, job.adapter).items():
        a_RD, b_OR = factors(layer, job.adapter)
        b_OR = b_OR * job.scale
        if not (a_RD.isfinite().all() and b_OR.isfinite().all()):
            raise AdapterError(f"export: layer {name} holds NaN or inf; nothing was written")
        found[name] = (a_RD, b_OR)
    return found


def rank_of_updates(updates: Updates) -> int:
    """Largest of a layer."""
    return max(a_RD.shape[0] for a_RD, _ in updates.values())


def padded(updates: Updates, rank: int) -> Updates:
    """The same updates, padded with zeros to one rank."""
    found: Updates = {}
    for name, (a_RD, b_OR) in updates.items():
        padding = rank - a_RD.shape[0]
        a_RD = nn.functional.pad(a_RD, (0, 0, 0, padding))
        found[name] = (a_RD, nn.functional.pad(b_OR, (0, padding)))
    return found
