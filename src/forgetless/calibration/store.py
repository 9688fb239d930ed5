"""Second moments on disk: safetensors under a fingerprint, re-used only when all of it matches."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from forgetless.calibration.engine import SiteMoments
from forgetless.data.tokens import TokenRow
from forgetless.errors import ArtefactError
from forgetless.linalg.moments import SecondMoment

FORMAT = "forgetless-moments-1"


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
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return folder / f"moments-{digest[:16]}.safetensors"


def save_moments(found: SiteMoments, path: Path, key: Mapping[str, str]) -> None:
    """Write atomically: a reader sees the whole file or none."""
    tensors = {}
    counts = {}
    for site, moment in found.moments.items():
        tensors[f"{site}/sum_DD"] = moment.sum_DD.cpu().contiguous()
        tensors[f"{site}/sum_D"] = moment.sum_D.cpu().contiguous()
        counts[site] = [moment.num_tokens, moment.num_samples]
    metadata = {
        "format": FORMAT,
        "key": json.dumps(dict(key), sort_keys=True),
        "site_of": json.dumps(found.site_of),
        "counts": json.dumps(counts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        save_file(tensors, part, metadata)
        part.replace(path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise ArtefactError(f"{path}: cannot be written ({error}); free some space") from error
    finally:
        part.unlink(missing_ok=True)


def load_moments(path: Path, key: Mapping[str, str]) -> SiteMoments | None:
    """Read moments back; None where the file does not exist.

    Raises:
        ArtefactError: Truncated, not ours, or of another model, data, template, mask rule or dtype.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ArtefactError(
                    f"{path}: expected {FORMAT}, got {metadata.get('format')!r}; delete the file"
                )
            stored = json.loads(metadata["key"])
            for part, value in key.items():
                if stored.get(part) != value:
                    raise ArtefactError(
                        f"{path}: expected {part} {value}, got {stored.get(part)}; delete the file"
                    )
            moments = {
                site: SecondMoment(
                    file.get_tensor(f"{site}/sum_DD"),
                    file.get_tensor(f"{site}/sum_D"),
                    num_tokens,
                    num_samples,
                )
                for site, (num_tokens, num_samples) in json.loads(metadata["counts"]).items()
            }
            return SiteMoments(moments, json.loads(metadata["site_of"]))
    except SafetensorError as error:
        raise ArtefactError(f"{path}: truncated or damaged ({error}); delete the file") from error
