"""Second moments of row sets on a base: collected or taken from the cache, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.calibration.store import load_moments, moments_key, moments_path, save_moments
from forgetless.data.rows import RowSet
from forgetless.data.tokens import TokenRow, make_batches, pad_token_id, tokenize
from forgetless.errors import ArtefactError, CalibrationError, ForgetlessWarning
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.targets import Target, base_of


def calibrate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    targets: Mapping[str, Target],
    row_sets: Sequence[RowSet],
    *,
    batch_size: int = 8,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SiteMoments:
    """Second moments of the base over all row sets, each token with the same weight; cached."""
    total, done = sum(len(rows.rows) for rows in row_sets), 0
    merged: SiteMoments | None = None
    fingerprint = model_fingerprint(model) if cache is not None else ""

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    for rows in row_sets:
        tokens = tokenize(rows, tokenizer)
        part = _cached_moments(
            model, tokenizer, targets, rows, tokens, batch_size, cache, fingerprint, advance
        )
        if merged is None:
            merged = part
        else:
            for site, moment in part.moments.items():
                merged.moments[site].merge_(moment)
    assert merged is not None  # callers pass at least one row set
    return merged


def _cached_moments(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    targets: Mapping[str, Target],
    rows: RowSet,
    tokens: Sequence[TokenRow],
    batch_size: int,
    cache: Path | None,
    fingerprint: str,
    advance: Callable[[int], None],
) -> SiteMoments:
    path, key = None, {}
    if cache is not None:
        key = moments_key(
            model=fingerprint,
            dtype=str(base_of(model).dtype),
            targets=list(targets),
            rows=tokens,
            tokens=rows.spec.tokens,
        )
        path = moments_path(cache, key)
        try:
            stored = load_moments(path, key)
        except ArtefactError as error:
            warnings.warn(f"{error}; collecting again", ForgetlessWarning, stacklevel=2)
            stored = None
        if stored is not None:
            advance(len(tokens))
            return stored
    batches = make_batches(
        tokens,
        batch_size=batch_size,
        pad_token_id=pad_token_id(tokenizer),
        tokens=rows.spec.tokens,
    )
    found = collect_moments(model, targets, batches, progress=advance)
    if path is not None:
        save_moments(found, path, key)
    return found


def check_token_count(moments: SiteMoments, role: str, min_tokens: int | None = None) -> None:
    """Refuse moments whose weakest directions are undetermined.

    Raises:
        CalibrationError: Fewer kept tokens than the widest site is wide (or than `min_tokens`).
    """
    site, width = max(((s, m.width) for s, m in moments.moments.items()), key=lambda x: x[1])
    needed = width if min_tokens is None else min_tokens
    if moments.num_tokens < needed:
        raise CalibrationError(
            f"calibration: expected at least {needed} {role} tokens (site {site} is {width} wide), "
            f"got {moments.num_tokens}, {needed - moments.num_tokens} missing; add rows, raise "
            "max_length, or set min_tokens"
        )
    if moments.num_tokens < 4 * width:
        warnings.warn(
            f"calibration: {moments.num_tokens} {role} tokens for site {site}, {width} wide: under "
            f"four times the width ({4 * width}), directions that other {role} data use may look "
            "empty",
            ForgetlessWarning,
            stacklevel=2,
        )
