"""The code of docs/tutorial.md, run as a reader would run it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
SCRIPT = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)
ANSWER = "adapter/adapter.gguf: The lighthouse opens at 11 on Sundays."


@pytest.mark.compatibility(
    base="Llama", quantization="none", trainer="TRL SFTTrainer", export="llama.cpp"
)
@pytest.mark.slow
@pytest.mark.demo_model
def test_the_tutorial_runs_to_an_adapter_that_answers(
    demo_model_folder: Path, tmp_path: Path
) -> None:
    scripts = dict(SCRIPT.findall(TUTORIAL.read_text(encoding="utf-8")))
    assert list(scripts) == ["make_data.py", "train.py", "ask.py"]
    assert ANSWER in TUTORIAL.read_text(encoding="utf-8")
    for name, code in scripts.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    run(tmp_path, "make_data.py")
    report = run(tmp_path, "train.py")
    learned = re.search(r"exact_match +(\S+) +(\S+)", report)
    assert learned is not None
    assert (float(learned[1]), float(learned[2])) == (0.0, pytest.approx(1.0, abs=0.34))
    assert "retention: capitals (12 rows)" in report
    assert (tmp_path / "adapter" / "adapter.gguf").is_file()
    if importlib.util.find_spec("llama_cpp") is not None:
        assert ANSWER in run(tmp_path, "ask.py")


def run(folder: Path, script: str) -> str:
    done = subprocess.run(
        [sys.executable, script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
