"""Every kind of export opens where forgetless is not: hidden, or in a new virtual environment.

The new environment takes minutes and downloads torch: `FORGETLESS_FRESH_ENVIRONMENT=1` asks for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from load_exports import logits
from safetensors.torch import save_file

import forgetless
from forgetless.adapters.export import EXPORT_TARGETS
from forgetless.adapters.forms import adapted_layers
from tiny_bases import tiny_base
from training_setup import ALL_FORMS, adapted

ASK = "FORGETLESS_FRESH_ENVIRONMENT"
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("load_exports.py")
ARCHITECTURES = ("llama", "gpt2", "t5")
# What peft or transformers open; other targets are for other programs.
TARGETS = [t for t in ("peft", "vllm", "sglang", "tgi", "merged") if t in EXPORT_TARGETS]
HIDE = (
    "import sys, runpy\n"
    "sys.modules['forgetless'] = sys.modules['trl'] = None\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each form of each architecture, every layer away from its start, for every target."""
    root, expected = tmp_path_factory.mktemp("exports"), {}
    for architecture in ARCHITECTURES:
        base = tiny_base(architecture)
        base.save_pretrained(root / architecture / "base")
        task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        for form in ALL_FORMS:
            model = adapted(tiny_base(architecture), form, task_type=task)
            generator = torch.Generator().manual_seed(1)
            for layer in adapted_layers(model).values():
                for side in (layer.lora_A, layer.lora_B):
                    weight = side["default"].weight
                    if weight.requires_grad:
                        noise = torch.randn(weight.shape, generator=generator)
                        weight.data.add_(noise, alpha=0.1)
            expected[f"{architecture}.{form}"] = logits(model)
            for target in TARGETS:
                forgetless.export(model, root / architecture / form / target, target=target)
    save_file(expected, root / "expected.safetensors")
    return root


def opened(python: Path | str, arguments: Sequence[str], exports: Path) -> None:
    """Let another process open all of them, away from this repository."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), *arguments, str(SCRIPT), str(exports)],
        capture_output=True,
        text=True,
        check=False,
        cwd=exports,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(ARCHITECTURES) * len(ALL_FORMS) * len(TARGETS)


def test_every_export_opens_where_forgetless_and_trl_cannot_be_imported(exports: Path) -> None:
    opened(sys.executable, ["-c", HIDE], exports)


@pytest.mark.slow
@pytest.mark.skipif(ASK not in os.environ, reason=f"installs torch anew: set {ASK}=1")
def test_every_export_opens_in_a_fresh_environment_with_peft_and_transformers(
    exports: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    pip += ["--constraint", ROOT / "constraints.txt"]
    # torch alone first, as in the Makefile: its pinned build stays.
    for packages in (["torch"], ["transformers", "peft"]):
        subprocess.run([*map(str, pip), *packages], check=True)
    opened(python, [], exports)
