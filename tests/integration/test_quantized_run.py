"""A whole run on a base that the recipe quantises: record, report, figures, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_setup import recipe_of, write_data
from transformers import PreTrainedModel

from forgetless.adapters.stored import read_stored
from forgetless.errors import AdapterError
from forgetless.experiments.exporting import export_folder
from forgetless.experiments.measure_adapter import measure_adapter
from forgetless.experiments.progress import Progress
from forgetless.experiments.record import load_record
from forgetless.experiments.run import run

CELL = {"base": "Llama", "trainer": "forgetless run", "export": "peft"}


@pytest.fixture
def folder(
    make_tiny_model: Callable[..., PreTrainedModel],
    save_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "data")
    save_model(make_tiny_model(hidden_size=64, intermediate_size=128), "base")
    return tmp_path


class Heard(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("quantization", "package", "words"),
    [
        pytest.param(
            name,
            package,
            words,
            id=name,
            marks=pytest.mark.compatibility(quantization=words, **CELL),
        )
        for name, package, words in (
            ("nf4", "bitsandbytes", "bitsandbytes nf4"),
            ("int8", "bitsandbytes", "bitsandbytes int8"),
            ("torchao-int8", "torchao", "torchao int8"),
        )
    ],
)
def test_a_recipe_quantises_its_base_and_every_verb_knows(
    quantization: str, package: str, words: str, folder: Path
) -> None:
    pytest.importorskip(package, reason=f"needs {package}: forgetless[quantized]")
    recipe = recipe_of(
        folder / "base",
        folder / "data",
        folder / "out",
        quantization=quantization,
        method={"name": "lora-null", "rank": 4, "trains": "b"},
    )
    heard = Heard()
    record = load_record(run(recipe, progress=heard))
    assert any(note.endswith(f"quantised: {words}") for note in heard.notes)
    assert record.model.quantization == words
    assert record.recipe["quantization"] == quantization
    full = recipe_of(folder / "base", folder / "data", folder / "full")
    assert record.model.parameters == load_record(run(full)).model.parameters
    assert "quantisation" in (folder / "out" / "report.html").read_text()
    assert words in (folder / "out" / "report.html").read_text()

    [report, _] = measure_adapter(recipe, folder / "out")
    mine = {item.name: item.metrics["nll"].tuned.mean for item in report.items}
    theirs = {item.name: item.metrics["nll"].tuned.mean for item in record.evaluation.items}
    # TRL holds the live adapter of a bitsandbytes base in bfloat16, the export is float32.
    assert mine == pytest.approx(theirs, rel=5e-3)

    told = Heard()
    export_folder(folder / "out", folder / "plain", quantization=quantization, progress=told)
    assert not told.warnings
    assert set(read_stored(folder / "plain").ranks.values()) == {4}
    export_folder(folder / "out", folder / "merged", target="merged", progress=told)
    assert [w for w in told.warnings if f"quantisation {words}, and is opened" in w]
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    with pytest.raises(AdapterError, match="leave out --quantization"):
        export_folder(folder / "out", folder / "again", target="merged", quantization=quantization)


def test_a_form_that_the_base_cannot_hold_ends_a_run_before_its_data_are_sampled(
    folder: Path,
) -> None:
    pytest.importorskip("torchao", reason="needs torchao: forgetless[quantized]")
    recipe = recipe_of(
        folder / "base",
        folder / "data",
        folder / "out",
        quantization="torchao-int8",
        method={"name": "lora-null", "rank": 4, "trains": "both"},
        preserve_data=["self"],
    )
    heard = Heard()
    with pytest.raises(AdapterError, match="trains: a or trains: b"):
        run(recipe, progress=heard)
    assert not any("sampling" in note for note in heard.notes)
