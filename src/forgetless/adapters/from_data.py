"""From rows to solved starts: a group of layers at a time, whose moments are reduced and freed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from forgetless.adapters.start import first_gradient, seeds_of, solve_layers
from forgetless.calibration.calibrate import RoleCalibration, check_token_count
from forgetless.calibration.engine import SiteMoments
from forgetless.calibration.memory import plan_calibration
from forgetless.data.rows import RowSet
from forgetless.data.spec import SourceWeights
from forgetless.errors import MethodError
from forgetless.linalg.moments import SecondMoment
from forgetless.methods.base import AdapterInit, Method, Role
from forgetless.models.targets import Target
from forgetless.processes import Processes


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What one role was calibrated on.

    Attributes:
        tokens: Kept tokens; in an encoder-decoder at the site that sees most.
        sites: How many sites.
        width: D of the widest.
    """

    tokens: int
    sites: int
    width: int

    @classmethod
    def on(cls, found: SiteMoments) -> Calibrated:
        """What these moments are of."""
        widths = [moment.width for moment in found.moments.values()]
        return cls(found.num_tokens, len(widths), max(widths))

    def with_more(self, other: Calibrated) -> Calibrated:
        """With further sites on the same data."""
        return Calibrated(
            max(self.tokens, other.tokens),
            self.sites + other.sites,
            max(self.width, other.width),
        )


@dataclass(slots=True)
class FromData:
    """Starts of all layers, and what they were solved from.

    Attributes:
        solved: A0 and B0 by layer.
        site_of: Target name to site.
        moments: By role: all of them, or, where they were collected in several passes, those that
            are asked for later, read from the cache; without a cache none.
        calibrated: By role.
        passes: Groups of layers, each with a forward pass over the data.
        moment_bytes: What the moments that were held at a time take.
    """

    solved: dict[str, AdapterInit] = field(default_factory=dict)
    site_of: dict[str, str] = field(default_factory=dict)
    moments: dict[Role, SiteMoments] = field(default_factory=dict)
    calibrated: dict[Role, Calibrated] = field(default_factory=dict)
    passes: int = 0
    moment_bytes: int = 0


def start_from_data(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    targets: Mapping[str, Target],
    row_sets: Mapping[Role, Sequence[RowSet]],
    *,
    collected: Mapping[Role, SiteMoments],
    gradients: Mapping[str, Tensor] | None,
    also: frozenset[Role],
    source_weights: SourceWeights,
    batch_size: int,
    min_tokens: int | None,
    memory_budget: int | None,
    cache: Path | None,
    seed: int,
    progress: Callable[[Role, int, int], None] | None,
    processes: Processes,
) -> FromData:
    """Collect what the method needs, and solve; for the arguments see `attach_rows`."""
    known = {role: found for role, found in collected.items() if role in method.needs}
    roles = sorted((method.needs | also) - known.keys())
    for role in roles:
        if not row_sets.get(role):
            who = f"method {method.name} needs" if role in method.needs else "regularisers need"
            raise MethodError(f"{who} {role} data, got none: give {role}_data")
    groups: Sequence[Mapping[str, Target]] = (targets,)
    calibrations: dict[Role, RoleCalibration] = {}
    found = FromData()
    if roles:
        copies = len(roles) + any(len(row_sets[role]) > 1 for role in roles)
        plan = plan_calibration(
            model, targets, copies=copies, budget=memory_budget, processes=processes
        )
        groups, found.moment_bytes = plan.groups, plan.moment_bytes
        found.passes = len(groups)
        for role in roles:
            calibrations[role] = RoleCalibration(
                model,
                tokenizer,
                row_sets[role],
                batch_size=batch_size,
                source_weights=source_weights,
                cache=cache,
                order=plan.order,
                passes=len(groups),
                progress=_for_role(progress, role),
                processes=processes,
            )
    seeds = seeds_of(targets, seed)
    kept: dict[Role, list[SiteMoments]] = {role: [] for role in roles}
    for group in groups:
        moments = {**known, **{role: c.collect(group) for role, c in calibrations.items()}}
        for role in sorted(method.needs & (method.bottom_roles | {"preserve"})):
            required = role in method.bottom_roles
            check_token_count(moments[role], role, min_tokens, required=required)
        of_group = gradients
        if method.rows_for_gradient and gradients is None:
            train = row_sets.get("train", ())
            with processes.together():
                of_group = first_gradient(model, tokenizer, method, group, train, batch_size)
        found.solved |= solve_layers(
            model, method, group, moments, of_group or {}, seeds, cache, processes
        )
        for role, part in moments.items():
            found.site_of |= part.site_of
            if role in calibrations:
                before = found.calibrated.get(role, Calibrated(0, 0, 0))
                found.calibrated[role] = before.with_more(Calibrated.on(part))
            if role in kept and (len(groups) == 1 or (cache is None and role in also)):
                kept[role].append(part)
    found.moments = dict(known)
    found.calibrated |= {role: Calibrated.on(part) for role, part in known.items()}
    for role, calibration in calibrations.items():
        whole = _joined(kept[role]) if kept[role] else calibration.stored(groups)
        if whole is not None:
            found.moments[role] = whole
    return found


def _joined(parts: Sequence[SiteMoments]) -> SiteMoments:
    if len(parts) == 1:
        return parts[0]
    moments: dict[str, SecondMoment] = {}
    site_of: dict[str, str] = {}
    for part in parts:
        moments |= part.moments
        site_of |= part.site_of
    return SiteMoments(moments, site_of)


def _for_role(
    progress: Callable[[Role, int, int], None] | None, role: Role
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(role, done, total)
