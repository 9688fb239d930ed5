"""Rows sampled from the base model itself: a stand-in for what it was trained on.

The model writes on from the words that open a user's turn (its chat template's), else from the
beginning-of-sequence token: user, reply and what follows, at temperature 1 from the whole
distribution, so that rows are draws from what the model holds likely.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from forgetless.atomic import write_atomically
from forgetless.data.rows import Row
from forgetless.data.tokens import pad_token_id
from forgetless.errors import DataError, ForgetlessWarning
from forgetless.models.cache import made_by_one
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.state import left_as_found

_FORMAT = 2  # raise it when sampling changes: older cache files then no longer match
_MARK = "\N{BLACK SQUARE}user text\N{BLACK SQUARE}"


def sample_self(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    max_length: int,
    seed: int,
    batch_size: int = 32,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Sample texts from the base model; the same ones for the same model and settings.

    Fewer rows are the beginning of more rows. The training mode, the generation settings and the
    random state of the caller are left as they were.

    Args:
        model: A causal language model; a `PeftModel` is sampled without its adapter.
        tokenizer: The model's.
        rows: How many.
        max_length: Tokens a row, with the prefix.
        seed: Of the draw.
        batch_size: Rows a forward pass; another one gives other rows.
        cache: Folder to keep the rows in and take them from.
        progress: Told rows done and rows in all.

    Returns:
        Rows with an empty prompt, whose text holds the prefix and all special tokens.

    Raises:
        DataError: `max_length` leaves no room behind the prefix, or there is no prefix, or the
            model is an encoder-decoder.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.is_encoder_decoder:
        raise DataError(
            f"self: expected a causal language model to sample from, got {type(base).__name__}, an "
            "encoder-decoder; name preserve data of your own, with prompt and completion"
        )
    prefix = _prefix(tokenizer)
    prefix_ids = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    if len(prefix_ids) >= max_length:
        raise DataError(
            f"self: expected max_length above the {len(prefix_ids)} tokens that open a user's "
            f"turn, got {max_length}; raise max_length"
        )
    settings = {
        "format": _FORMAT,
        "model": model_fingerprint(model),
        "prefix": prefix,
        "max_length": max_length,
        "seed": seed,
        "batch_size": batch_size,
    }
    file = None if cache is None else cache / f"self-{_digest(settings)}.json"
    there = file is not None and file.exists()
    texts = [] if file is None else _read(file, settings)
    if len(texts) < rows:
        with made_by_one(file), _sampling(model) as base:
            if file is not None and (texts or not there):  # another process may have sampled
                texts = max(texts, _read(file, settings), key=len)
            while len(texts) < rows:
                # Whole batches, each under a seed of its own: the draws depend neither on how many
                # rows are asked for nor on how many were kept.
                torch.manual_seed((seed * 1_000_003 + len(texts) // batch_size) % 2**63)
                texts += _batch(base, tokenizer, prefix_ids, batch_size, max_length)
                if progress is not None:
                    progress(min(len(texts), rows), rows)
        if file is not None:
            _write(file, settings, texts)
    return [Row(prompt="", completion=text, answers=(), templated=True) for text in texts[:rows]]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that the chat template writes before a user's first word, else the BOS token."""
    if tokenizer.chat_template is not None:
        with contextlib.suppress(jinja2.TemplateError, ValueError):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], tokenize=False
            )
            before, mark, _ = str(text).partition(_MARK)
            if mark and before:
                return before
    start = tokenizer.bos_token or tokenizer.eos_token
    if start is None:
        raise DataError(
            "self: expected a tokenizer with a chat template or a beginning-of-sequence token to "
            "sample from, got neither; name preserve data of your own"
        )
    return str(start)


@contextlib.contextmanager
def _sampling(model: PreTrainedModel | PeftModel) -> Iterator[PreTrainedModel]:
    """The bare base model in eval mode, with plain sampling settings; random state restored."""
    adapter_off: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    base: Any = model
    if isinstance(model, PeftModel):
        adapter_off = model.disable_adapter()
        base = model.get_base_model()
    devices = [base.device] if base.device.type == "cuda" else []
    # Many chat models ship a repetition penalty or top-p, and generate() takes all that its
    # arguments leave open from there: a fresh configuration is the only way to the bare model.
    settings = base.generation_config
    try:
        with (
            torch.random.fork_rng(devices=devices),
            left_as_found(model),
            adapter_off,
            torch.no_grad(),
        ):
            model.eval()
            base.generation_config = GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0
            )
            yield base
    finally:
        base.generation_config = settings


def _batch(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix_ids: list[int],
    batch_size: int,
    max_length: int,
) -> list[str]:
    # Shape letters: B = rows, T = positions. All prompts are equal, so nothing is padded.
    prompt_BT = torch.tensor([prefix_ids] * batch_size, dtype=torch.int64, device=base.device)
    sampled_BT = base.generate(
        input_ids=prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_length=max_length,
        pad_token_id=pad_token_id(tokenizer),
    )
    return [_text(tokenizer, ids, max_length) for ids in sampled_BT.tolist()]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], max_length: int) -> str:
    """Text of sampled tokens that is no longer than `max_length` when it is tokenised again."""
    for end in range(len(ids), 0, -1):
        text = str(
            tokenizer.decode(
                ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        ).rstrip("\N{REPLACEMENT CHARACTER}")  # the end may cut a character of several bytes
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= max_length:
            return text
    return ""


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path, settings: dict[str, Any]) -> list[str]:
    """Texts of a cache file that belongs to these settings and is whole; none otherwise."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict) and content.get("settings") == settings:
        texts = content.get("texts")
        if (
            isinstance(texts, list)
            and len(texts) % settings["batch_size"] == 0
            and all(isinstance(text, str) for text in texts)
        ):
            return texts
    warnings.warn(
        f"{file}: not a whole file of these self samples; they are sampled again",
        ForgetlessWarning,
        stacklevel=3,
    )
    return []


def _write(file: Path, settings: dict[str, Any], texts: list[str]) -> None:
    content = json.dumps({"settings": settings, "texts": texts}, ensure_ascii=True)
    try:
        write_atomically(file, content)
    except OSError as failure:
        warnings.warn(
            f"{file}: self samples could not be kept ({failure.strerror}); the next run samples "
            "again",
            ForgetlessWarning,
            stacklevel=3,
        )
