"""What PEFT's method_comparison calls loss, so that figures can be laid beside its board.

Its "forgetting" is the rise of the mean over all tokens of 100 Wikipedia texts, cut at 768 tokens,
of the cross-entropy between a token and the logits *of that token's own position*: as the code
stands, nothing is shifted, so that these logits, which predict the next token, are held against the
one that was just read. It is no likelihood. The rise of `nll` on the same texts is what the name
promises; this is what the board's figures are.

Source: `calculate_mean_per_token_loss` in method_comparison/MetaMathQA/run.py of PEFT.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from forgetless.evaluation.base_cache import BaseCache
from forgetless.evaluation.loaded import LoadedItem, Progress
from forgetless.evaluation.pairing import Measured, paired
from forgetless.evaluation.scored import Scorer
from forgetless.models.pair import TunedModel

_FIGURE = "board loss"


def board_loss(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedItem,
    *,
    cache: BaseCache,
    progress: Progress | None = None,
) -> Measured:
    """Mean over all tokens of an item's rows, prompts too, in nats.

    Args:
        model: The tuned model, in eval mode.
        tokenizer: Its tokenizer.
        loaded: The item.
        cache: The base's figures.
        progress: Called with stage, rows done and rows in all.

    Raises:
        AdapterError: A loss that is NaN or infinite.
    """
    rows = [replace(row, prompt_length=0) for row in loaded.tokens]
    scorer = Scorer(model, tokenizer, loaded.item, cache, progress, own_position=True)
    theirs, ours = scorer.base(rows, _FIGURE), scorer.tuned(rows, _FIGURE)
    tokens = ours.num_tokens.astype(np.float64)
    return paired("board_loss", theirs.nll_sum / tokens, ours.nll_sum / tokens, tokens)
