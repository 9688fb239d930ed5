"""Second moments of row sets on a base: collected or taken from the cache, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.calibration.order import CallOrder
from forgetless.calibration.store import (
    load_moments,
    load_site,
    moments_key,
    moments_path,
    read_site_of,
    save_moments,
)
from forgetless.calibration.weights import WeighedSources, weights_that_count
from forgetless.data.pairs import PairBatch, make_pair_batches, tokenize_pairs
from forgetless.data.rows import RowSet
from forgetless.data.spec import SourceWeights
from forgetless.data.tokens import Batch, TokenRow, make_batches, pad_token_id, tokenize
from forgetless.errors import ArtefactError, CalibrationError, ForgetlessWarning
from forgetless.linalg.moments import SecondMoment
from forgetless.models.cache import kept
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.targets import Target, base_of
from forgetless.processes import ALONE, Processes


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
    processes: Processes = ALONE,
) -> SiteMoments:
    """Second moments of the base over all row sets, of all targets at once; cached for each.

    `source_weights` says whether every token has the same weight, or every row set. An
    encoder-decoder reads prompts with its encoder and completions with its decoder. Several
    processes, each of which calls this with the same rows, divide them.
    """
    calibration = RoleCalibration(
        model,
        tokenizer,
        row_sets,
        batch_size=batch_size,
        source_weights=source_weights,
        cache=cache,
        progress=progress,
        processes=processes,
    )
    return calibration.collect(targets)


class RoleCalibration:
    """Second moments of one role's row sets on a base, a group of layers at a time."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        row_sets: Sequence[RowSet],
        *,
        batch_size: int,
        source_weights: SourceWeights,
        cache: Path | None,
        order: CallOrder | None = None,
        passes: int = 1,
        progress: Callable[[int, int], None] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Tokenise; nothing is collected yet.

        Args:
            model: The base, or a PeftModel.
            tokenizer: Its tokenizer.
            row_sets: Sources of the role.
            batch_size: Rows in a forward pass.
            source_weights: Whether every token has the same weight, or every source.
            cache: Folder to keep each source's moments in.
            order: Of the calls of all layers, where it is known.
            passes: How many groups there will be, for `progress`.
            progress: Called with the rows done, and all rows.
            processes: That divide the rows among them.
        """
        self._model, self._batch_size, self._order = model, batch_size, order
        self._pairs = base_of(model).config.is_encoder_decoder
        self._padding = pad_token_id(tokenizer)
        read = tokenize_pairs if self._pairs else tokenize
        self._sources = [(rows, read(rows, tokenizer)) for rows in row_sets]
        self._weights = weights_that_count(row_sets, source_weights)
        self._shelf = _Shelf(cache, model, processes) if cache is not None else None
        self._processes = processes
        self._progress = progress
        self._done, self._total = 0, passes * sum(len(rows.rows) for rows in row_sets)

    def collect(self, targets: Mapping[str, Target]) -> SiteMoments:
        """Moments at the inputs of some layers, over all sources."""
        sources = WeighedSources(self._weights)
        for rows, tokens in self._sources:
            end = self._done + len(tokens)
            collect = partial(
                collect_moments,
                self._model,
                targets,
                self._batches(tokens, rows),
                source=rows.spec.label,
                order=self._order,
                progress=partial(self._advance, end),
                processes=self._processes,
            )
            if self._shelf is None:
                part = collect()
            else:
                part = self._shelf.kept(tokens, rows, list(targets), collect)
            if self._done < end:  # kept ones were taken, or other processes had more
                self._advance(end, end - self._done)
            sources.add(part)
        return sources.total()

    def stored(self, groups: Sequence[Mapping[str, Target]]) -> SiteMoments | None:
        """What was collected for these groups, read from the cache a site at a time."""
        if self._shelf is None:
            return None
        files, site_of = {}, {}
        for targets in groups:
            names = list(targets)
            paths = [self._shelf.path(tokens, rows, names) for rows, tokens in self._sources]
            if not all(path.exists() for path in paths):  # the disk is full
                return None
            found = read_site_of(paths[0])
            site_of.update(found)
            files.update(dict.fromkeys(found.values(), paths))
        return SiteMoments(StoredMoments(files, self._weights), site_of)

    def _batches(
        self, tokens: Sequence[TokenRow], rows: RowSet
    ) -> Iterator[Batch] | Iterator[PairBatch]:
        size, padding = self._batch_size, self._padding
        if self._pairs:
            return make_pair_batches(tokens, batch_size=size, pad_token_id=padding)
        return make_batches(tokens, batch_size=size, pad_token_id=padding, tokens=rows.spec.tokens)

    def _advance(self, end: int, rows: int) -> None:
        """Tell of rows of a source; the other processes have done about as many."""
        self._done = min(self._done + rows * self._processes.count, end)
        if self._progress is not None:
            self._progress(self._done, self._total)


class StoredMoments(Mapping[str, SecondMoment]):
    """Moments that lie in files, one or more for each site; each is read when it is asked for."""

    def __init__(self, files: Mapping[str, Sequence[Path]], weights: SourceWeights) -> None:
        """Remember where they are: by site, the file of each source."""
        self._files, self._weights = dict(files), weights

    def __getitem__(self, site: str) -> SecondMoment:
        sources = WeighedSources(self._weights)
        for path in self._files[site]:
            sources.add(SiteMoments({site: load_site(path, site)}, {}))
        return sources.total().moments[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class _Shelf:
    """A cache folder, for one model; what goes wrong with it costs time only."""

    def __init__(self, folder: Path, model: nn.Module, processes: Processes) -> None:
        self._folder, self._processes = folder, processes
        self._model = model_fingerprint(model)
        self._dtype = str(base_of(model).dtype)

    def path(self, tokens: Sequence[TokenRow], rows: RowSet, targets: Sequence[str]) -> Path:
        """The file of one source at some layers."""
        return moments_path(self._folder, self._key(tokens, rows, targets))

    def _key(
        self, tokens: Sequence[TokenRow], rows: RowSet, targets: Sequence[str]
    ) -> dict[str, str]:
        return moments_key(
            model=self._model,
            dtype=self._dtype,
            targets=targets,
            rows=tokens,
            tokens=rows.spec.tokens,
        )

    def kept(
        self,
        tokens: Sequence[TokenRow],
        rows: RowSet,
        targets: Sequence[str],
        collect: Callable[[], SiteMoments],
    ) -> SiteMoments:
        """Moments of these tokens: from the folder, or collected and kept for the next time."""
        path, key = self.path(tokens, rows, targets), self._key(tokens, rows, targets)
        return kept(
            path,
            take=lambda: _take(path, key),
            make=collect,
            put=lambda found: _put(found, path, key),
            processes=self._processes,
        )


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
