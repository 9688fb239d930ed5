"""Second moments of row sets on a base: collected or taken from the cache, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.calibration.store import load_moments, moments_key, moments_path, save_moments
from forgetless.calibration.weights import WeighedSources, weights_that_count
from forgetless.data.pairs import PairBatch, make_pair_batches, tokenize_pairs
from forgetless.data.rows import RowSet
from forgetless.data.spec import SourceWeights
from forgetless.data.tokens import Batch, TokenRow, make_batches, pad_token_id, tokenize
from forgetless.errors import ArtefactError, CalibrationError, ForgetlessWarning
from forgetless.models.cache import made_by_one
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.targets import Target, base_of


def calibrate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    targets: Mapping[str, Target],
    row_sets: Sequence[RowSet],
    *,
    batch_size: int = 8,
    source_weights: SourceWeights = "tokens",
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SiteMoments:
    """Second moments of the base over all row sets; cached for each.

    `source_weights` says whether every token has the same weight, or every row set. An
    encoder-decoder reads prompts with its encoder and completions with its decoder.
    """
    total, done = sum(len(rows.rows) for rows in row_sets), 0
    sources = WeighedSources(weights_that_count(row_sets, source_weights))
    shelf = _Shelf(cache, model, targets) if cache is not None else None
    pairs = base_of(model).config.is_encoder_decoder
    padding = pad_token_id(tokenizer)

    def batches(tokens: Sequence[TokenRow], rows: RowSet) -> Iterator[Batch] | Iterator[PairBatch]:
        if pairs:
            return make_pair_batches(tokens, batch_size=batch_size, pad_token_id=padding)
        return make_batches(
            tokens, batch_size=batch_size, pad_token_id=padding, tokens=rows.spec.tokens
        )

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    for rows in row_sets:
        tokens = (tokenize_pairs if pairs else tokenize)(rows, tokenizer)
        before = done
        collect = partial(
            collect_moments,
            model,
            targets,
            batches(tokens, rows),
            source=rows.spec.label,
            progress=advance,
        )
        part = shelf.kept(tokens, rows, collect) if shelf is not None else collect()
        if done == before:  # kept ones were taken
            advance(len(tokens))
        sources.add(part)
    return sources.total()


class _Shelf:
    """A cache folder, for one model and its targets; what goes wrong with it costs time only."""

    def __init__(self, folder: Path, model: nn.Module, targets: Mapping[str, Target]) -> None:
        self._folder = folder
        self._model = model_fingerprint(model)
        self._dtype = str(base_of(model).dtype)
        self._targets = list(targets)

    def _place(self, tokens: Sequence[TokenRow], rows: RowSet) -> tuple[Path, dict[str, str]]:
        key = moments_key(
            model=self._model,
            dtype=self._dtype,
            targets=self._targets,
            rows=tokens,
            tokens=rows.spec.tokens,
        )
        return moments_path(self._folder, key), key

    def kept(
        self, tokens: Sequence[TokenRow], rows: RowSet, collect: Callable[[], SiteMoments]
    ) -> SiteMoments:
        """Moments of these tokens: from the folder, or collected and kept for the next time.

        Of several processes one collects, the others wait and read.
        """
        path, key = self._place(tokens, rows)
        there = path.exists()
        found = _take(path, key)
        if found is None:
            with made_by_one(path):
                if not there:
                    found = _take(path, key)
                if found is None:
                    found = collect()
                    _put(found, path, key)
        return found


def _take(path: Path, key: Mapping[str, str]) -> SiteMoments | None:
    try:
        return load_moments(path, key)
    except ArtefactError as error:
        warnings.warn(
            f"{error}; the moments are collected again and replace it",
            ForgetlessWarning,
            stacklevel=4,
        )
        return None


def _put(found: SiteMoments, path: Path, key: Mapping[str, str]) -> None:
    try:
        save_moments(found, path, key)
    except ArtefactError as error:
        warnings.warn(
            f"{error}; this run goes on, the next one collects them again",
            ForgetlessWarning,
            stacklevel=4,
        )


def check_token_count(
    moments: SiteMoments, role: str, min_tokens: int | None = None, *, required: bool = True
) -> None:
    """Refuse moments whose weakest directions are undetermined.

    Args:
        moments: Of one role.
        role: Its name, for the messages.
        min_tokens: Fewest tokens to accept, in place of the widest site's width.
        required: Whether too few are an error; a warning otherwise.

    Raises:
        CalibrationError: Fewer kept tokens at a site than it is wide (or than `min_tokens`).
    """
    # Where all sites see the same tokens, as in decoders, this is the widest.
    site, moment = max(moments.moments.items(), key=lambda x: x[1].width / max(x[1].num_tokens, 1))
    width, found = moment.width, moment.num_tokens
    needed = width if min_tokens is None else min_tokens
    if required and found < needed:
        raise CalibrationError(
            f"calibration: expected at least {needed} {role} tokens (site {site} is {width} wide), "
            f"got {found}, {needed - found} missing; add rows, raise "
            "max_length, or set min_tokens"
        )
    if found < 4 * width:
        warnings.warn(
            f"calibration: {found} {role} tokens for site {site}, {width} wide: under "
            f"four times the width ({4 * width}), directions that other {role} data use may look "
            "empty",
            ForgetlessWarning,
            stacklevel=2,
        )
