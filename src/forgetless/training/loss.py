"""Mean negative log-likelihood of completion tokens, the language-model head run on those alone.

On a CPU TRL scores every position, prompt and padding too, and multiplies its gradient in float32:
half of a training step of a small model with short answers.
"""

# Shape letters in this file: B = rows, T = positions, N = predicted tokens, H = hidden width,
# V = vocabulary.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from forgetless.errors import TrainingError

IGNORED = -100


def count_predicted(labels_BT: Tensor) -> int:
    """Labels that count, in the positions that have one before them."""
    return int((labels_BT[:, 1:] != IGNORED).sum())


def completion_loss(
    model: nn.Module, head: nn.Module, inputs: Mapping[str, Any], num_tokens: Tensor | int
) -> Tensor:
    """Sum of −log p over the labels of a batch, divided by `num_tokens`.

    Args:
        model: A causal language model, wrapped by whatever trains it.
        head: Its output embedding.
        inputs: `input_ids`, `attention_mask` and `labels` (B, T); labels of -100 do not count.
        num_tokens: Labels that count in all batches of the optimiser step.

    Returns:
        A scalar, float32 or wider.
    """
    labels_BT = inputs["labels"]
    counts_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    counts_BT[:, 1:] = labels_BT[:, 1:] != IGNORED
    predicts_BT = counts_BT.roll(-1, dims=1)
    arguments = {name: value for name, value in inputs.items() if name != "labels"}
    logits_NV = chosen_logits(model, head, {**arguments, "use_cache": False}, predicts_BT)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return cross_entropy(logits_NV, labels_BT[counts_BT], reduction="sum") / num_tokens


def chosen_logits(
    model: nn.Module, head: nn.Module, inputs: Mapping[str, Any], chosen_BT: Tensor
) -> Tensor:
    """Logits (N, V) at chosen positions, row by row, the head run on those alone.

    Raises:
        TrainingError: The model does not call its head as a module.
    """
    with _head_sees(head, chosen_BT):
        logits = model(**inputs).logits
    if logits.shape[:2] != (1, int(chosen_BT.sum())):
        raise TrainingError(
            f"training: expected {type(model).__name__} to call its output embedding, got logits "
            "without it; this architecture is not supported"
        )
    return logits[0]


@contextmanager
def _head_sees(head: nn.Module, predicts_BT: Tensor) -> Iterator[None]:
    """While open, the head gets the chosen positions only, as one row (1, N, H)."""

    def choose(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTH, *rest = arguments
        return (hidden_BTH[predicts_BT.to(hidden_BTH.device)].unsqueeze(0), *rest)

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
