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
    shelf = _Shelf(cache, model, targets) if cache is not None else None

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    for rows in row_sets:
        tokens = tokenize(rows, tokenizer)
        part = shelf.take(tokens, rows) if shelf is not None else None
        if part is not None:
            advance(len(tokens))
        else:
            batches = make_batches(
                tokens,
                batch_size=batch_size,
                pad_token_id=pad_token_id(tokenizer),
                tokens=rows.spec.tokens,
            )
            part = collect_moments(
                model, targets, batches, source=rows.spec.label, progress=advance
            )
            if shelf is not None:
                shelf.put(part, tokens, rows)
        if merged is None:
            merged = part
        else:
            for site, moment in part.moments.items():
                merged.moments[site].merge_(moment)
    assert merged is not None  # callers pass at least one row set
    return merged


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

    def take(self, tokens: Sequence[TokenRow], rows: RowSet) -> SiteMoments | None:
        """Moments of these tokens, where the folder has them whole."""
        try:
            return load_moments(*self._place(tokens, rows))
        except ArtefactError as error:
            warnings.warn(
                f"{error}; the moments are collected again and replace it",
                ForgetlessWarning,
                stacklevel=3,
            )
            return None

    def put(self, found: SiteMoments, tokens: Sequence[TokenRow], rows: RowSet) -> None:
        """Keep moments for the next time."""
        try:
            save_moments(found, *self._place(tokens, rows))
        except ArtefactError as error:
            warnings.warn(
                f"{error}; this run goes on, the next one collects them again",
                ForgetlessWarning,
                stacklevel=3,
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
        CalibrationError: Fewer kept tokens than the widest site is wide (or than `min_tokens`).
    """
    site, width = max(((s, m.width) for s, m in moments.moments.items()), key=lambda x: x[1])
    needed = width if min_tokens is None else min_tokens
    if required and moments.num_tokens < needed:
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
