"""Negative log-likelihood, teacher-forced greedy match and KL(base‖tuned), per row.

Scored tokens are the completion's for a row with a prompt, and all but the first for plain text.
Log probabilities are taken in float32 (or wider) whatever the model's dtype, and summed in float64.

The Hugging Face model inside a PeftModel is run, not the PeftModel: trainers wrap the `forward` of
the model they are given in autocast and leave it so, and the model inside computes in the precision
of its own weights.
"""

# Shape letters in this file: B = rows of a batch, T = positions, N = scored tokens of a batch,
# C = positions of one chunk, V = vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.data.tokens import Batch, TokenRow, make_batches, pad_token_id
from forgetless.evaluation.base_states import BaseStates
from forgetless.evaluation.selection import PositionLogits, StateLogits, model_inputs
from forgetless.models.pair import TunedModel
from forgetless.models.placement import input_device
from forgetless.models.targets import base_of


@dataclass(frozen=True)
class RowScores:
    """Figures of one model on some rows, in the order of the rows.

    Attributes:
        nll_sum: Sum of −log p over the row's scored tokens, nats.
        num_tokens: How many tokens were scored; 0 where truncation left no completion.
        greedy_match: Whether the most likely token is the row's at every scored position.
    """

    nll_sum: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    greedy_match: NDArray[np.bool_]


@torch.no_grad()
def score_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    *,
    batch_size: int = 16,
    own_position: bool = False,
    progress: Callable[[int], None] | None = None,
) -> RowScores:
    """Score rows with a model as it is now.

    Args:
        model: A causal language model or a PeftModel.
        tokenizer: For the padding token only.
        rows: Tokenised rows.
        batch_size: Rows a forward pass.
        own_position: Hold every token against the logits of its own position, which predict the
            next one: no likelihood (see `board.py`).
        progress: Called with the number of rows of each finished batch.

    Returns:
        Sums per row.
    """
    sums = _Sums.zeros(len(rows))
    causal = base_of(model)
    for batch in _batches(rows, tokenizer, batch_size):
        scored = _Scored.of(batch, input_device(causal), own_position=own_position)
        if scored.count:
            logits = PositionLogits(causal, scored.inputs, scored.predicts_BT)
            for start in logits.starts():
                part = scored.part(start, logits.chunk)
                sums.add(logits.at(start), part)
        if progress is not None:
            progress(len(batch.index))
    return sums.scores()


@torch.no_grad()
def compare_rows(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    *,
    batch_size: int = 16,
    states: BaseStates | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[RowScores, RowScores, NDArray[np.float64]]:
    """Score rows with base and tuned model, and sum KL(base‖tuned) over the same tokens.

    Both distributions are exact: the whole vocabulary, temperature 1.

    Args:
        model: The tuned model; its base is what `disable_adapter()` gives.
        tokenizer: For the padding token only.
        rows: Tokenised rows.
        batch_size: Rows a forward pass.
        states: The base's hidden states of these rows in these batches; gathered where they are
            not there yet.
        progress: Called with the number of rows of each finished batch.

    Returns:
        The base's scores, the tuned model's, and the sum of KL per row in nats.
    """
    base_sums, tuned_sums = _Sums.zeros(len(rows)), _Sums.zeros(len(rows))
    kl_sum = np.zeros(len(rows))
    causal = base_of(model)
    states = states or BaseStates(None)
    for number, batch in enumerate(_batches(rows, tokenizer, batch_size)):
        scored = _Scored.of(batch, input_device(causal))
        if scored.count:
            tuned = PositionLogits(causal, scored.inputs, scored.predicts_BT)
            with model.disable_adapter():
                base = _base_logits(causal, scored, states, number)
            for start in tuned.starts():
                part = scored.part(start, tuned.chunk)
                tuned_CV = tuned_sums.add(tuned.at(start), part)
                with model.disable_adapter():
                    base_CV = base_sums.add(base.at(start), part)
                _add_by_row(kl_sum, part.row_C, kl_divergence(base_CV, tuned_CV))
        if progress is not None:
            progress(len(batch.index))
    return base_sums.scores(), tuned_sums.scores(), kl_sum


def _base_logits(
    causal: PreTrainedModel, scored: _Scored, states: BaseStates, number: int
) -> PositionLogits | StateLogits:
    """The base's logits, its adapters off, from a forward pass or from what one left."""
    kept_NH = states.of(number, scored.count)
    if kept_NH is not None:
        return StateLogits(causal, kept_NH)
    logits = PositionLogits(causal, scored.inputs, scored.predicts_BT)
    states.keep(number, logits.hidden_NH)
    return logits


def kl_divergence(base_log_CV: Tensor, tuned_log_CV: Tensor) -> Tensor:
    """Σ_v p_base (log p_base − log p_tuned) of each position; exactly 0 where both are equal.

    A token that the base rules out (a logit of −inf) adds nothing: p log p tends to 0.
    """
    tuned_log_CV = tuned_log_CV.to(base_log_CV.device)
    base_CV = base_log_CV.exp()
    return (base_CV * (base_log_CV - tuned_log_CV)).masked_fill(base_CV == 0, 0.0).sum(-1)


@dataclass(frozen=True, slots=True)
class _Part:
    """Scored tokens of one chunk: their ids and the row each belongs to."""

    target_C: Tensor
    row_C: Tensor


@dataclass(frozen=True, slots=True)
class _Scored:
    """A batch on the model's device, with the positions that predict scored tokens."""

    inputs: dict[str, Any]
    predicts_BT: Tensor
    target_N: Tensor
    row_N: Tensor
    index: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, own_position: bool = False) -> _Scored:
        if own_position:
            scored_BT = predicts_BT = batch.kept_BT.bool()
        else:
            # The first token of a row has nothing before it to be predicted from.
            not_first_BT = batch.attention_mask_BT.cumsum(1) > 1
            scored_BT = batch.kept_BT.bool() & not_first_BT
            predicts_BT = torch.zeros_like(scored_BT)
            predicts_BT[:, :-1] = scored_BT[:, 1:]
        row_BT = torch.tensor(batch.index).unsqueeze(1).expand_as(scored_BT)
        return cls(
            inputs=model_inputs(batch.input_ids_BT, batch.attention_mask_BT, device),
            predicts_BT=predicts_BT,
            target_N=batch.input_ids_BT[scored_BT],
            row_N=row_BT[scored_BT],
            index=batch.index,
        )

    @property
    def count(self) -> int:
        return self.target_N.shape[0]

    def part(self, start: int, size: int) -> _Part:
        return _Part(self.target_N[start : start + size], self.row_N[start : start + size])


@dataclass(frozen=True, slots=True)
class _Sums:
    """Running sums per row."""

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    mismatches: NDArray[np.int64]

    @classmethod
    def zeros(cls, rows: int) -> _Sums:
        return cls(np.zeros(rows), np.zeros(rows, np.int64), np.zeros(rows, np.int64))

    def add(self, logits_CV: Tensor, part: _Part) -> Tensor:
        """Add a chunk; returns its log probabilities."""
        dtype = torch.promote_types(logits_CV.dtype, torch.float32)
        log_CV = torch.log_softmax(logits_CV, -1, dtype=dtype)
        target_C = part.target_C.to(log_CV.device)
        nll_C = -log_CV.gather(-1, target_C.unsqueeze(-1)).squeeze(-1)
        _add_by_row(self.nll, part.row_C, nll_C)
        mismatch_C = (logits_CV.argmax(-1) != target_C).cpu()
        np.add.at(self.mismatches, part.row_C[mismatch_C].numpy(), 1)
        np.add.at(self.tokens, part.row_C.numpy(), 1)
        return log_CV

    def scores(self) -> RowScores:
        matches = (self.mismatches == 0) & (self.tokens > 0)
        return RowScores(self.nll, self.tokens, matches)


def _batches(
    rows: Sequence[TokenRow], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[Batch]:
    return list(
        make_batches(
            rows, batch_size=batch_size, pad_token_id=pad_token_id(tokenizer), tokens="completion"
        )
    )


def _add_by_row(sums: NDArray[np.float64], row_C: Tensor, values_C: Tensor) -> None:
    np.add.at(sums, row_C.numpy(), values_C.double().cpu().numpy())
