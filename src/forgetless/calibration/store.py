"""Second moments on disk: safetensors under a fingerprint, re-used only when all of it matches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgetless.atomic import replace_with
from forgetless.calibration.engine import SiteMoments
from forgetless.data.tokens import TokenRow
from forgetless.errors import ArtefactError
from forgetless.linalg.moments import SecondMoment

FORMAT = "forgetless-moments-3"


def moments_key(
    *, model: str, dtype: str, targets: Sequence[str], rows: Sequence[TokenRow], tokens: str
) -> dict[str, str]:
    """All that second moments depend on, as text.

    Args:
        model: Fingerprint of the base's weights.
        dtype: Dtype of the forward pass.
        targets: Names of the layers.
        rows: The token ids themselves, so that data, template, tokenizer and truncation are in.
        tokens: The mask rule, `all` or `completion`.
    """
    state = hashlib.sha256()
    for row in rows:
        state.update(f"{row.prompt_length}:{','.join(map(str, row.input_ids))};".encode())
    names = hashlib.sha256("\n".join(sorted(targets)).encode()).hexdigest()
    return {
        "model": model,
        "dtype": dtype,
        "targets": names[:16],
        "rows": state.hexdigest()[:32],
        "tokens": tokens,
    }


def moments_path(folder: Path, key: Mapping[str, str]) -> Path:
    """File for a key inside a cache folder."""
    described = json.dumps([FORMAT, dict(key)], sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()
    return folder / f"moments-{digest[:16]}.safetensors"


def save_moments(found: SiteMoments, path: Path, key: Mapping[str, str]) -> None:
    """Write atomically: a reader sees the whole file or none.

    Raises:
        ArtefactError: The file cannot be written.
    """
    tensors = {}
    sites = {}
    for site, moment in found.moments.items():
        tensors[f"{site}/lower_DD"] = moment.lower_DD.cpu().contiguous()
        tensors[f"{site}/sum_D"] = moment.sum_D.cpu().contiguous()
        sites[site] = {
            "num_tokens": moment.num_tokens,
            "num_samples": moment.num_samples,
            "sha256": _digest(tensors[f"{site}/lower_DD"], tensors[f"{site}/sum_D"]),
        }
    metadata = {
        "format": FORMAT,
        "key": json.dumps(dict(key), sort_keys=True),
        "site_of": json.dumps(found.site_of),
        "sites": json.dumps(sites),
    }
    try:
        replace_with(path, lambda part: save_file(tensors, part, metadata))
    except (SafetensorError, OSError) as error:  # either, where the disk is full
        raise ArtefactError(
            f"{path}: moments could not be written ({error}); free some space or take another "
            "folder for the cache"
        ) from error


def load_moments(path: Path, key: Mapping[str, str]) -> SiteMoments | None:
    """Read moments back; None where the file does not exist.

    Raises:
        ArtefactError: Truncated, damaged, not ours, or of another model, data, template, mask rule
            or dtype. The message names no remedy: the caller has one, to collect again.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_origin(path, metadata, key)
            sites = json.loads(metadata["sites"])
            moments = {site: _site(file, site, facts) for site, facts in sites.items()}
            site_of = {str(t): str(s) for t, s in json.loads(metadata["site_of"]).items()}
    # What reading fails with where bytes of the header or of its JSON are others.
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ArtefactError):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ArtefactError(f"{path}: truncated or damaged ({reason})") from error
    if not moments or not moments.keys() >= set(site_of.values()):
        raise ArtefactError(f"{path}: damaged (a layer without its moment)")
    for site, moment in moments.items():
        whole = _digest(moment.lower_DD, moment.sum_D) == sites[site].get("sha256")
        if not (whole and moment.lower_DD.isfinite().all() and moment.sum_D.isfinite().all()):
            raise ArtefactError(f"{path}: damaged (the moment of site {site})")
    return SiteMoments(moments, site_of)


def read_site_of(path: Path) -> dict[str, str]:
    """Target name to site, of a file that this process has written or read."""
    with safe_open(path, framework="pt") as file:
        return {str(t): str(s) for t, s in json.loads(file.metadata()["site_of"]).items()}


def load_site(path: Path, site: str) -> SecondMoment:
    """One moment of a file that this process has written or read.

    Raises:
        ArtefactError: It has gone, or is damaged, since.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["sites"])[site]
            moment = _site(file, site, facts)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{path}: expected the moment of site {site}, which was there before; run again"
        ) from error
    if _digest(moment.lower_DD, moment.sum_D) != facts["sha256"]:
        raise ArtefactError(f"{path}: damaged (the moment of site {site}); run again")
    return moment


@dataclass(frozen=True, slots=True)
class MomentsHeader:
    """What a file of second moments says of itself.

    Attributes:
        key: What they were collected on: fingerprints and mask rule, as `moments_key` makes it.
        widths: D by site.
        num_tokens: Kept tokens.
        num_samples: Rows that they came from.
        targets: Layers that these sites feed.
    """

    key: dict[str, str]
    widths: dict[str, int]
    num_tokens: int
    num_samples: int
    targets: tuple[str, ...]


def read_moments_header(path: Path) -> MomentsHeader:
    """Read what a file of second moments says of itself, without its tensors.

    Raises:
        ArtefactError: Truncated, damaged, or no second moments.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_origin(path, metadata, {})
            sites = json.loads(metadata["sites"])
            widths = {s: int(file.get_slice(f"{s}/sum_D").get_shape()[0]) for s in sites}
        first = next(iter(sites.values()))
        return MomentsHeader(
            key=json.loads(metadata["key"]),
            widths=widths,
            num_tokens=int(first["num_tokens"]),
            num_samples=int(first["num_samples"]),
            targets=tuple(json.loads(metadata["site_of"])),
        )
    except ArtefactError:
        raise
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        StopIteration,
    ) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ArtefactError(f"{path}: truncated or damaged ({reason})") from error


def _check_origin(path: Path, metadata: Mapping[str, str], key: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArtefactError(f"{path}: expected {FORMAT}, got {metadata.get('format')!r}")
    stored = json.loads(metadata["key"])
    for part, value in key.items():
        if stored.get(part) != value:
            raise ArtefactError(f"{path}: expected {part} {value}, got {stored.get(part)}")


def _site(file: Any, site: str, facts: Mapping[str, Any]) -> SecondMoment:
    return SecondMoment(
        file.get_tensor(f"{site}/lower_DD"),
        file.get_tensor(f"{site}/sum_D"),
        int(facts["num_tokens"]),
        int(facts["num_samples"]),
    )


def _digest(*tensors: Tensor) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
