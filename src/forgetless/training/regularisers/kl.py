"""kl: λ KL(base‖tuned) on batches of preserve rows, over the tokens that evaluation scores.

The base comes free of a second model, from `disable_adapter()`: two more forward passes a batch,
one of them with gradients, both under the trainer's autocast. Rows are taken in a seeded order, the
same after a resume. Where a model has dropout, it acts on the tuned pass only.

Source: the distillation term of Learning without Forgetting, arXiv:1606.09282, with the base as the
teacher, at temperature 1.
"""

# Shape letters in this file: B = rows, T = positions, N = scored tokens, C = tokens of one chunk,
# V = vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from forgetless.data.tokens import TokenRow, has_target, make_batches, pad_token_id
from forgetless.evaluation.likelihood import kl_divergence
from forgetless.evaluation.selection import chunk_size, model_inputs, output_head
from forgetless.models.placement import Sharding, input_device
from forgetless.models.state import left_as_found
from forgetless.models.targets import base_of
from forgetless.training.loss import chosen_logits
from forgetless.training.regularisers.base import Binding, MicroBatch, Regulariser, Term


@dataclass(frozen=True, kw_only=True)
class KL(Regulariser):
    """Distillation from the base on preserve data.

    Attributes:
        weight: λ; the term is a mean in nats a token.
        batch_size: Preserve rows of one forward pass.
    """

    weight: float = 1.0
    batch_size: int = 4

    name: ClassVar[str] = "kl"
    title: ClassVar[str] = "KL(base‖tuned) on preserve batches"
    paper: ClassVar[str] = "after Learning without Forgetting, arXiv:1606.09282"
    needs_rows: ClassVar[bool] = True
    sharded_by: ClassVar[frozenset[Sharding]] = frozenset({"FSDP", "DeepSpeed"})

    def __post_init__(self) -> None:
        """Check the options."""
        self._require_positive(weight=self.weight)
        self._require(
            self.batch_size >= 1, f"batch_size: expected 1 or more, got {self.batch_size}"
        )

    def bind(self, to: Binding) -> Term:
        """Take the rows that have a token to score."""
        rows = self._rows(to.data.rows)
        scored = [row for row in rows if has_target(row)]
        self._require(
            bool(scored),
            f"expected rows of preserve data with a token to score, got none in {len(rows)}; give "
            "completions, or raise max_length",
        )
        return _KLTerm(self, to, scored)


class _KLTerm(Term):
    def __init__(self, options: KL, to: Binding, rows: Sequence[TokenRow]) -> None:
        self._options = options
        self._to = to
        self._rows = rows

    def loss(self, model: nn.Module, micro: MicroBatch) -> Tensor | None:
        """The mean over this batch's scored tokens, divided by the passes of the step."""
        base = base_of(self._to.model)
        inputs, predicts_BT = self._batch(micro, input_device(base))
        head = output_head(base)
        with torch.no_grad(), left_as_found(self._to.model), self._to.model.disable_adapter():
            self._to.model.eval()
            base_NV = chosen_logits(model, head, inputs, predicts_BT)
        tuned_NV = chosen_logits(model, head, inputs, predicts_BT)
        size = chunk_size(tuned_NV.shape[-1])
        pairs = zip(base_NV.split(size), tuned_NV.split(size), strict=True)
        total = torch.stack([_kl(*pair) for pair in pairs]).sum()
        return total * (self._options.weight / (len(tuned_NV) * micro.count))

    def _batch(self, micro: MicroBatch, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Inputs, and the positions that predict a scored token."""
        batch = next(
            make_batches(
                self._drawn(micro),
                batch_size=self._options.batch_size,
                pad_token_id=pad_token_id(self._to.tokenizer),
                tokens="completion",
            )
        )
        scored_BT = batch.kept_BT & (batch.attention_mask_BT.cumsum(1) > 1)
        predicts_BT = scored_BT.roll(-1, dims=1)
        return model_inputs(batch.input_ids_BT, batch.attention_mask_BT, device), predicts_BT

    def _drawn(self, micro: MicroBatch) -> list[TokenRow]:
        """Rows of one pass: the next ones of a shuffle of all, a new shuffle each time around."""
        first = (micro.step * micro.stride + micro.index) * self._options.batch_size
        drawn = []
        for position in range(first, first + self._options.batch_size):
            around, place = divmod(position, len(self._rows))
            generator = torch.Generator().manual_seed((self._to.seed + around) % 2**63)
            order = torch.randperm(len(self._rows), generator=generator)
            drawn.append(self._rows[int(order[place])])
        return drawn


def _kl(base_CV: Tensor, tuned_CV: Tensor) -> Tensor:
    dtype = torch.promote_types(tuned_CV.dtype, torch.float32)
    base_log_CV, tuned_log_CV = (
        torch.log_softmax(logits, -1, dtype=dtype) for logits in (base_CV, tuned_CV)
    )
    return kl_divergence(base_log_CV, tuned_log_CV).sum()
