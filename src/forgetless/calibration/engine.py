"""Collect second moments in one forward pass of the base: no head, no cache, no gradient."""

# Shape letters in this file: B = rows, T = positions, D = layer input width, N = kept tokens.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forgetless.calibration.hooks import base_forward, observe_sites
from forgetless.calibration.memory import refuse_beyond_memory
from forgetless.data.tokens import Batch
from forgetless.errors import CalibrationError
from forgetless.linalg.moments import SecondMoment
from forgetless.models.targets import Target, base_of, module_suffixes

SHOWN_NAMES = 8


@dataclass(frozen=True, slots=True)
class SiteMoments:
    """Second moments of one data role.

    Attributes:
        moments: By site.
        site_of: Target name to site; every target has one.
    """

    moments: dict[str, SecondMoment]
    site_of: dict[str, str]

    def of(self, target: str) -> SecondMoment:
        """Moment of the tensor that feeds a target."""
        return self.moments[self.site_of[target]]

    @property
    def num_tokens(self) -> int:
        """Kept tokens; the same at every site."""
        return next(iter(self.moments.values())).num_tokens


def collect_moments(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Batch],
    *,
    source: str = "the data",
    progress: Callable[[int], None] | None = None,
) -> SiteMoments:
    """Sum x xᵀ, x, tokens and rows over the kept tokens of `batches`, once per site.

    The result does not depend on batching or on the side of the padding, up to rounding.

    Args:
        model: The base, or a PeftModel, whose adapters are switched off meanwhile.
        targets: Layers whose inputs are wanted.
        batches: Padded batches; `kept_BT` says which tokens count.
        source: What the rows are called in messages.
        progress: Called with the number of rows after each batch.

    Raises:
        CalibrationError: NaN or inf in an input (layer and row are named) or in the sum of its
            squares, no kept token at all, a layer that is fed no or only part of the tokens, or too
            little free memory.
    """
    collector = _Collector(source)
    device = next(model.parameters()).device
    with base_forward(model) as decoder:
        refuse_beyond_memory(model, decoder, targets)
        with observe_sites(model, targets, collector.observe) as sites:
            for batch in batches:
                collector.start(batch, device)
                decoder(**_inputs(batch, device), use_cache=False)
                sites.forget_tensors()
                if progress is not None:
                    progress(len(batch.index))
    if not collector.moments or all(m.num_tokens == 0 for m in collector.moments.values()):
        raise CalibrationError(
            "calibration: expected at least one kept token, got none; is the data empty?"
        )
    _refuse_idle(model, targets, sites.site_of)
    _refuse_overflow(collector.moments, source)
    return SiteMoments(collector.moments, dict(sites.site_of))


def _refuse_idle(
    model: nn.Module, targets: Mapping[str, Target], site_of: Mapping[str, str]
) -> None:
    """Refuse targets that text never reaches, such as those of a vision tower."""
    idle = [name for name in targets if name not in site_of]
    if idle:
        called = module_suffixes(base_of(model), [name for name in targets if name in site_of])
        more = ", …" if len(called) > SHOWN_NAMES else ""
        raise CalibrationError(
            f"calibration: expected text to reach every target, {len(idle)} of {len(targets)} were "
            f"never called, the first {idle[0]}; leave them out: "
            f"targets=[{', '.join(called[:SHOWN_NAMES])}{more}]"
        )


def _refuse_overflow(moments: Mapping[str, SecondMoment], source: str) -> None:
    """Refuse sums that left the range of their dtype, where every activation was finite."""
    for site, moment in moments.items():
        if not bool(moment.sum_DD.isfinite().all()):
            raise CalibrationError(
                f"calibration: the squares of the input of layer {site} overflow "
                f"{str(moment.sum_DD.dtype).removeprefix('torch.')} on {source}; "
                "leave that layer out of the targets, or load the model in float64"
            )


def _inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    mask_BT = batch.attention_mask_BT.to(device)
    inputs = {"input_ids": batch.input_ids_BT.to(device), "attention_mask": mask_BT}
    if not bool(mask_BT[:, 0].all()):  # left padding: positions must count tokens only
        inputs["position_ids"] = (mask_BT.cumsum(1) - 1).clamp_min(0)
    return inputs


class _Collector:
    """Adds each site's kept tokens to its moment."""

    def __init__(self, source: str) -> None:
        self.moments: dict[str, SecondMoment] = {}
        self._source = source
        self._kept_N: Tensor
        self._batch: Batch

    def start(self, batch: Batch, device: torch.device) -> None:
        """Take the next batch's mask."""
        self._batch = batch
        self._kept_N = batch.kept_BT.reshape(-1).nonzero()[:, 0].to(device)
        self._num_samples = int(batch.kept_BT.bool().any(1).sum())

    def observe(self, site: str, x: Tensor) -> None:
        """Add one site's tokens of the current batch."""
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] != self._batch.kept_BT.numel():
            raise CalibrationError(
                f"calibration: layer {site} sees {flat.shape[0]} of {self._batch.kept_BT.numel()} "
                "tokens (a routed expert?); leave it out of the targets"
            )
        x_ND = flat.index_select(0, self._kept_N.to(flat.device))
        if site not in self.moments:
            self.moments[site] = SecondMoment.zeros(x.shape[-1], dtype=x.dtype, device=x.device)
        # A NaN or inf anywhere makes its column's sum non-finite: one read of x, no copy.
        if not bool(x_ND.sum(0, dtype=self.moments[site].sum_D.dtype).isfinite().all()):
            self._refuse(site, x_ND)
        self.moments[site].add_(x_ND, num_samples=self._num_samples)

    def _refuse(self, site: str, x_ND: Tensor) -> None:
        bad = int((~x_ND.isfinite()).any(1).nonzero()[0, 0])
        position = int(self._kept_N[bad])
        row = self._batch.index[position // self._batch.kept_BT.shape[1]]
        raise CalibrationError(
            f"calibration: the input of layer {site} is NaN or inf at row {row} of "
            f"{self._source} (from 0); remove that row, or load the model in float32 or bfloat16"
        )
