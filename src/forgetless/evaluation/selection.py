"""Logits at chosen positions only: the rest is dropped before the language-model head.

Logits of a whole batch are by far the largest tensor of a forward pass (16 rows of 512 tokens and a
vocabulary of 128k make 4 GB in fp32). A pre-hook on the head hands it a chunk of the chosen hidden
states; the other chunks go through the head alone.
"""

# Shape letters in this file: B = rows of a batch, T = positions, N = chosen positions,
# C = positions of one chunk, H = hidden width, V = vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetless.errors import AdapterError

MAX_CHUNK = 512
CHUNK_ELEMENTS = 2**25  # fp32 logits of one chunk: at most 128 MiB


@dataclass(slots=True)
class _Seen:
    """What the hooks of one forward pass saw at the head."""

    hidden_NH: Tensor | None = None
    head_logits: Tensor | None = None


def output_head(model: PreTrainedModel) -> nn.Module:
    """The language-model head of a Hugging Face model.

    Raises:
        AdapterError: The model has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise AdapterError(
            f"evaluation: expected a causal language model, got {type(model).__name__} "
            "without an output embedding; load it with AutoModelForCausalLM"
        )
    return head


def chunk_size(vocabulary: int) -> int:
    """Positions of one chunk of logits: at most 512, fewer for very large vocabularies."""
    return max(16, min(MAX_CHUNK, CHUNK_ELEMENTS // max(1, vocabulary)))


@contextmanager
def _head_sees(
    model: PreTrainedModel, choose: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Iterator[_Seen]:
    """While open, the head gets the second tensor of `choose(hidden)`; the first one is kept."""
    seen = _Seen()

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.hidden_NH, chosen = choose(args[0])
        return (chosen, *args[1:])

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        seen.head_logits = output

    head = output_head(model)
    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def model_inputs(
    input_ids_BT: Tensor, attention_mask_BT: Tensor, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of a forward pass; position ids only where the padding is on the left.

    Right padding needs none, and not every model takes them.
    """
    inputs: dict[str, Any] = {
        "input_ids": input_ids_BT.to(device),
        "attention_mask": attention_mask_BT.to(device),
        "use_cache": False,
    }
    if not bool(attention_mask_BT[:, 0].all()):
        inputs["position_ids"] = (attention_mask_BT.cumsum(1) - 1).clamp(min=0).to(device)
    return inputs


class PositionLogits:
    """Logits of one forward pass at chosen positions, chunk by chunk.

    Some models scale or cap the head's output (Gemma 2, Cohere, Granite). Where the logits of the
    first chunk are not what the head gave, the other chunks go through the whole model again.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any], chosen_BT: Tensor) -> None:
        """Run the model once.

        Args:
            model: A causal language model; with its adapters as they are now.
            inputs: Keyword arguments of its forward pass.
            chosen_BT: Positions whose logits are wanted, bool.
        """
        self._model = model
        self._inputs = inputs
        self._chosen_BT = chosen_BT
        self.num_positions = int(chosen_BT.sum())
        self.chunk = _chunk_of(model)
        first_CV, seen = self._forward(0)
        if seen.hidden_NH is None or seen.head_logits is None:
            raise AdapterError(
                f"evaluation: expected {type(model).__name__} to call its output embedding, "
                "got logits without it; this architecture is not supported"
            )
        self._first_CV = first_CV
        self._hidden_NH = seen.hidden_NH
        raw_CV = seen.head_logits[0]
        self._head_alone = torch.equal(raw_CV.to(first_CV.dtype), first_CV)

    @property
    def hidden_NH(self) -> Tensor | None:
        """What the head makes the logits from; None where the model changes what the head gives."""
        return self._hidden_NH if self._head_alone else None

    def _forward(self, start: int) -> tuple[Tensor, _Seen]:
        def choose(hidden_BTH: Tensor) -> tuple[Tensor, Tensor]:
            hidden_NH = hidden_BTH[self._chosen_BT.to(hidden_BTH.device)]
            return hidden_NH, hidden_NH[start : start + self.chunk].unsqueeze(0)

        with _head_sees(self._model, choose) as seen:
            output = self._model(**self._inputs)
        return output.logits[0], seen

    def starts(self) -> range:
        """First position of each chunk."""
        return range(0, self.num_positions, self.chunk)

    def at(self, start: int) -> Tensor:
        """Logits (C, V) of the chunk from `start`.

        The adapters must be switched as they were in the first pass.
        """
        if start == 0:
            return self._first_CV
        if not self._head_alone:
            return self._forward(start)[0]
        return _through_head(self._model, self._hidden_NH, start)


class StateLogits:
    """Logits of an earlier pass from its hidden states, chunk by chunk: the head alone."""

    def __init__(self, model: PreTrainedModel, hidden_NH: Tensor) -> None:
        """Take what `PositionLogits.hidden_NH` gave for the same model."""
        self._model = model
        self._hidden_NH = hidden_NH.to(next(output_head(model).parameters()).device)

    def at(self, start: int) -> Tensor:
        """Logits (C, V) of the chunk from `start`, with the adapters as they are now."""
        return _through_head(self._model, self._hidden_NH, start)


def _through_head(model: PreTrainedModel, hidden_NH: Tensor, start: int) -> Tensor:
    chunk_1CH = hidden_NH[start : start + _chunk_of(model)].unsqueeze(0)
    logits_1CV: Tensor = output_head(model)(chunk_1CH)
    return logits_1CV[0]


def _chunk_of(model: PreTrainedModel) -> int:
    return chunk_size(int(model.config.get_text_config().vocab_size))
