"""Collect second moments in one forward pass of the base: no head, no cache, no gradient.

Nothing is computed after the last input that is wanted.
"""

# Shape letters in this file: B = rows, T = positions, L = positions of an encoder-decoder's
# decoder, D = layer input width, N = kept tokens.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetless.calibration.distributed import add_up_
from forgetless.calibration.hooks import NothingMoreToSeeError, base_forward, observe_sites
from forgetless.calibration.memory import refuse_beyond_memory
from forgetless.calibration.order import CallOrder, find_call_order
from forgetless.data.pairs import IGNORED_LABEL, PairBatch
from forgetless.data.tokens import Batch
from forgetless.errors import CalibrationError
from forgetless.linalg.moments import SecondMoment
from forgetless.models.placement import input_device
from forgetless.models.targets import Target, base_of, module_suffixes
from forgetless.processes import ALONE, Processes

SHOWN_NAMES = 8
AT_ONCE = 4096  # kept tokens that are copied at a time
SHIFT = "prepare_decoder_input_ids_from_labels"


@dataclass(frozen=True, slots=True)
class SiteMoments:
    """Second moments of one data role.

    Attributes:
        moments: By site.
        site_of: Target name to site; every target has one.
    """

    moments: Mapping[str, SecondMoment]
    site_of: dict[str, str]

    def of(self, target: str) -> SecondMoment:
        """Moment of the tensor that feeds a target."""
        return self.moments[self.site_of[target]]

    @property
    def num_tokens(self) -> int:
        """Kept tokens: the same at every site, but in an encoder-decoder, where the most count."""
        return max(moment.num_tokens for moment in self.moments.values())


def collect_moments(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Batch] | Iterable[PairBatch],
    *,
    source: str = "the data",
    order: CallOrder | None = None,
    progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> SiteMoments:
    """Sum x xᵀ, x, tokens and rows over the kept tokens of `batches`, once per site.

    The result does not depend on batching, on the side of the padding or on the number of
    processes, up to rounding.

    Args:
        model: The base, or a PeftModel, whose adapters are switched off meanwhile.
        targets: Layers whose inputs are wanted.
        batches: Padded batches; `kept_BT` says which tokens count. Of pairs, for an
            encoder-decoder, every token counts where it is read: prompts in the encoder and in
            cross-attention's keys and values, completions in the rest of the decoder.
        source: What the rows are called in messages.
        order: In which order these layers, among others, are called; found out where not given.
        progress: Called with the number of rows after each batch.
        processes: That divide the batches among them: each is given all of them and takes its own;
            every one ends with the sums over all.

    Raises:
        CalibrationError: NaN or inf in an input (layer and row are named) or in the sum of its
            squares, no kept token at all, a layer that is fed no or only part of the tokens, or too
            little free memory.
    """
    collector = _Collector(source)
    device = input_device(base_of(model))
    with processes.together(), base_forward(model) as decoder:
        if order is None:
            order = find_call_order(model, decoder, targets)
        refuse_beyond_memory(model, targets, order, processes)
        calls = order.of(targets)
        with observe_sites(model, targets, collector.observe, calls) as sites:
            mine: Iterator[Batch | PairBatch] = islice(
                batches, processes.rank, None, processes.count
            )
            for batch in mine:
                run = partial(_run, base_of(model), decoder, batch, collector, device)
                run()
                sites.forget_tensors()
                if not collector.is_finite():
                    collector.look_for_bad_rows()
                    run()  # raises, but where finite inputs have left the range of the sums
                    sites.forget_tensors()
                if progress is not None:
                    progress(len(batch.index))
    found = SiteMoments(collector.moments, dict(sites.site_of))
    if processes.count > 1:
        add_up_(collector.moments, found.site_of, targets, processes)
    if not found.moments or all(m.num_tokens == 0 for m in found.moments.values()):
        raise CalibrationError(
            "calibration: expected at least one kept token, got none; is the data empty?"
        )
    _refuse_idle(model, targets, found.site_of)
    _refuse_overflow(found.moments, source)
    return found


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
    """Refuse sums that left the range of their dtype, where every activation was finite.

    The diagonal tells: |Σ x_i x_j| is at most the larger of Σ x_i² and Σ x_j².
    """
    for site, moment in moments.items():
        if not bool(moment.lower_DD.diagonal().isfinite().all()):
            raise CalibrationError(
                f"calibration: the squares of the input of layer {site} overflow "
                f"{str(moment.lower_DD.dtype).removeprefix('torch.')} on {source}; "
                "leave that layer out of the targets, or load the model in float64"
            )


def _inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    mask_BT = batch.attention_mask_BT.to(device)
    inputs = {"input_ids": batch.input_ids_BT.to(device), "attention_mask": mask_BT}
    if not bool(mask_BT[:, 0].all()):  # left padding: positions must count tokens only
        inputs["position_ids"] = (mask_BT.cumsum(1) - 1).clamp_min(0)
    return inputs


def _run(
    base: PreTrainedModel,
    decoder: nn.Module,
    batch: Batch | PairBatch,
    collector: _Collector,
    device: torch.device,
) -> None:
    """One batch, up to the last input that is wanted."""
    with suppress(NothingMoreToSeeError):
        if isinstance(batch, PairBatch):
            _run_pair(base, batch, collector, device)
        else:
            collector.start(_Stream.of(batch.kept_BT, batch.index, device))
            decoder(**_inputs(batch, device), use_cache=False)


def _run_pair(
    base: PreTrainedModel, batch: PairBatch, collector: _Collector, device: torch.device
) -> None:
    """Encoder, then decoder without the head: which stream a layer reads is known in each.

    Raises:
        CalibrationError: The encoder reads something else than text.
    """
    if base.main_input_name != "input_ids" or not hasattr(base, SHIFT):
        raise CalibrationError(
            "calibration: expected an encoder-decoder from text to text, such as T5 or BART, got "
            f"{type(base).__name__}; take a method that needs no data, such as lora"
        )
    labels_BL = batch.labels_BL.to(device)
    # The model's own rule: most put a start token in front, some turn the last token to the front.
    decoder_ids_BL = base.prepare_decoder_input_ids_from_labels(labels=labels_BL)
    kept_BL = labels_BL != IGNORED_LABEL
    inputs = _inputs(batch.encoder, device)
    prompts = _Stream.of(batch.encoder.kept_BT, batch.index, device)
    collector.start(prompts)
    states_BTD = base.get_encoder()(**inputs).last_hidden_state
    collector.start(_Stream.of(kept_BL, batch.index, device), (states_BTD, prompts))
    base.get_decoder()(
        input_ids=decoder_ids_BL,
        attention_mask=kept_BL.to(torch.int64),
        encoder_hidden_states=states_BTD,
        encoder_attention_mask=inputs["attention_mask"],
        use_cache=False,
    )


@dataclass(frozen=True, slots=True)
class _Stream:
    """The tokens that a part of the model reads.

    Attributes:
        shape: (B, T).
        kept_N: Which of the flattened positions count; None for all of them.
        num_samples: Rows that have one that does.
        index: Row of the data in each row of the batch.
    """

    shape: torch.Size
    kept_N: Tensor | None
    num_samples: int
    index: tuple[int, ...]

    @classmethod
    def of(cls, kept_BT: Tensor, index: tuple[int, ...], device: torch.device) -> _Stream:
        everything = bool(kept_BT.all())
        kept_N = None if everything else kept_BT.reshape(-1).nonzero()[:, 0].to(device)
        return cls(kept_BT.shape, kept_N, int(kept_BT.bool().any(1).sum()), index)

    def parts(self, flat: Tensor) -> Iterator[Tensor]:
        """The tokens that count, without a copy of all of them at once."""
        if self.kept_N is None:
            yield flat
            return
        kept_N = self.kept_N.to(flat.device)
        for start in range(0, len(kept_N), AT_ONCE):
            yield flat.index_select(0, kept_N[start : start + AT_ONCE])

    def row_of(self, position: int) -> int:
        """Row of the data of one of the tokens that count."""
        flat = position if self.kept_N is None else int(self.kept_N[position])
        return self.index[flat // self.shape[1]]


class _Collector:
    """Adds each site's kept tokens to its moment."""

    def __init__(self, source: str) -> None:
        self.moments: dict[str, SecondMoment] = {}
        self._source = source
        self._stream: _Stream
        self._encoded: tuple[Tensor, _Stream] | None = None
        self._adds = True

    def start(self, stream: _Stream, encoded: tuple[Tensor, _Stream] | None = None) -> None:
        """Take what is read next; `encoded` is the encoder's result and what the encoder read."""
        self._stream, self._encoded = stream, encoded

    def is_finite(self) -> bool:
        """Whether no input so far was NaN or inf: it would have stayed in its column's sum."""
        finite = [moment.sum_D.isfinite().all() for moment in self.moments.values()]
        by_device: dict[torch.device, list[Tensor]] = {}
        for one in finite:
            by_device.setdefault(one.device, []).append(one)
        return all(bool(torch.stack(some).all()) for some in by_device.values())

    def look_for_bad_rows(self) -> None:
        """From here on add nothing, but refuse the first input that is not finite."""
        self._adds = False

    def observe(self, site: str, x: Tensor) -> None:
        """Add one site's tokens of the current batch."""
        stream = self._stream
        if self._encoded is not None and x is self._encoded[0]:  # cross-attention's keys, values
            stream = self._encoded[1]
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] != stream.shape.numel():
            raise CalibrationError(
                f"calibration: layer {site} sees {flat.shape[0]} of {stream.shape.numel()} "
                "tokens (a routed expert?); leave it out of the targets"
            )
        if not self._adds:
            self._refuse_bad_row(site, flat, stream)
            return
        if site not in self.moments:
            self.moments[site] = SecondMoment.zeros(x.shape[-1], dtype=x.dtype, device=x.device)
        moment = self.moments[site]
        for x_ND in stream.parts(flat):
            moment.add_(x_ND)
        moment.num_samples += stream.num_samples

    def _refuse_bad_row(self, site: str, flat: Tensor, stream: _Stream) -> None:
        before = 0
        for x_ND in stream.parts(flat):
            bad_N = (~x_ND.isfinite()).any(1)
            if bool(bad_N.any()):
                row = stream.row_of(before + int(bad_N.nonzero()[0, 0]))
                raise CalibrationError(
                    f"calibration: the input of layer {site} is NaN or inf at row {row} of "
                    f"{self._source} (from 0); remove that row, or load the model in float32 or "
                    "bfloat16"
                )
            before += len(x_ND)
