"""Which second moments are held at a time, so that they fit into memory."""

# Shape letter in this file: D = width of a site.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from forgetless.calibration.hooks import base_forward
from forgetless.calibration.order import CallOrder, find_call_order
from forgetless.errors import CalibrationError
from forgetless.models.hardware import GIB, free_memory
from forgetless.models.placement import input_device
from forgetless.models.targets import Target, base_of
from forgetless.processes import ALONE, Processes

SOLVE_MATRICES = 4  # of float64, as wide as the widest site, that a solve needs beside the moments


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """Groups of layers whose moments are held together, one forward pass over the data for each.

    Attributes:
        order: Of the calls of all layers.
        groups: In that order; layers that read one tensor are in one group.
        moment_bytes: What the largest group's moments take.
    """

    order: CallOrder
    groups: tuple[dict[str, Target], ...]
    moment_bytes: int


def plan_calibration(
    model: nn.Module,
    targets: Mapping[str, Target],
    *,
    copies: int = 1,
    budget: int | None = None,
    processes: Processes = ALONE,
) -> CalibrationPlan:
    """Divide layers into as few groups as fit.

    Args:
        model: The base, or a PeftModel.
        targets: Layers whose moments are wanted.
        copies: Moments of a site that are held at once: one for each role of data, and one more
            where sources are summed up.
        budget: Bytes that moments may take at a time, in each process; by default what is free
            where the model lies, less what a solve takes.
        processes: That collect together, and so in the same groups: the one with least room
            decides. Those on one machine divide its main memory.

    Raises:
        CalibrationError: One site alone takes more.
    """
    base = base_of(model)
    device = input_device(base)
    with processes.together(), base_forward(model) as decoder:
        order = find_call_order(model, decoder, targets)
    sites: dict[str, list[str]] = {order.site_of[name]: [] for name in order.of(targets)}
    idle = [name for name in targets if name not in order.site_of]
    for name in targets:
        if name in order.site_of:
            sites[order.site_of[name]].append(name)
    sizes = {site: copies * moment_bytes(targets, [site], base.dtype) for site in sites}
    if budget is None:
        budget = min(processes.each(_free(device, targets, processes)))
        _check_site(targets, sizes, budget, f"free on {device.type}", "name fewer layers")
    else:
        _check_site(targets, sizes, budget, "in memory_budget", "raise it, or name fewer layers")
    groups: list[list[str]] = [[]]
    used, largest = 0, 0
    # From the last site on: a pass costs what lies before its group's end, so that the group which
    # is not full should be the first.
    for site, size in reversed(sizes.items()):
        if used + size > budget:
            groups.insert(0, [])
            used = 0
        groups[0] += sites[site]
        used += size
        largest = max(largest, used)
    groups[0] += idle  # refused after the first pass, not after the last
    named = tuple({name: targets[name] for name in targets if name in set(g)} for g in groups)
    return CalibrationPlan(order, named, largest)


def _free(device: torch.device, targets: Mapping[str, Target], processes: Processes) -> int:
    widest = max(target.in_features for target in targets.values())
    return _share_of_free(device, processes) - SOLVE_MATRICES * 8 * widest**2


def _share_of_free(device: torch.device, processes: Processes) -> int:
    """Bytes, of which the processes on one machine divide its main memory."""
    return free_memory(device) // (1 if device.type == "cuda" else processes.on_this_machine)


def _check_site(
    targets: Mapping[str, Target], sizes: Mapping[str, int], budget: int, where: str, remedy: str
) -> None:
    site, size = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    if size > budget:
        raise CalibrationError(
            f"calibration: expected {size / GIB:.3g} GiB for the second moments of site {site} "
            f"alone, {targets[site].in_features} wide, got {max(budget, 0) / GIB:.3g} GiB {where}; "
            f"{remedy} in targets, first of all not {site.rpartition('.')[2]}"
        )


def refuse_beyond_memory(
    model: nn.Module,
    targets: Mapping[str, Target],
    order: CallOrder,
    processes: Processes = ALONE,
) -> None:
    """Refuse targets whose moments take more than is free where the model lies.

    Raises:
        CalibrationError: States what is needed and what is free.
    """
    base = base_of(model)
    device = input_device(base)
    free = _share_of_free(device, processes)
    names = sorted({order.site_of[name] for name in targets if name in order.site_of})
    needed = moment_bytes(targets, names, base.dtype)
    if needed > free:
        widest = max(names, key=lambda name: targets[name].in_features)
        raise CalibrationError(
            f"calibration: expected {needed / GIB:.3g} GiB of free memory for the moments of "
            f"{len(names)} sites, got {free / GIB:.3g} GiB on {device.type}; name fewer "
            f"layers in targets, first of all not {widest.rpartition('.')[2]}, which is "
            f"{targets[widest].in_features} wide"
        )


def moment_bytes(targets: Mapping[str, Target], sites: Iterable[str], dtype: torch.dtype) -> int:
    """Bytes of the moments of `sites`, each named after a target: D² + D numbers."""
    size = torch.promote_types(dtype, torch.float32).itemsize
    widths = [targets[site].in_features for site in sites]
    return sum(size * width * (width + 1) for width in widths)
