"""A finished run, called again: what is gone or damaged is made again, what changed is noticed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_setup import recipe_of, write_data
from safetensors.torch import load_file

from forgetless.errors import AdapterError, ArtefactError, RecipeError
from forgetless.experiments.exporting import export_folder
from forgetless.experiments.measure_adapter import measure_adapter
from forgetless.experiments.progress import Progress
from forgetless.experiments.run import run
from forgetless.recipe import Recipe


class Notes(Progress):
    """Remembers notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def finished(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose run is finished: `both`, so that a checkpoint is no plain LoRA."""
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "data")
    recipe = recipe_of(
        tiny_model_path,
        tmp_path / "data",
        tmp_path / "out",
        method={"name": "lora-null", "rank": 4, "trains": "both"},
        training={"max_steps": 2, "learning_rate": 1e-3},
        evaluation={},
    )
    run(recipe)
    return recipe


def again(recipe: Recipe) -> list[str]:
    heard = Notes()
    run(recipe, progress=heard)
    return heard.notes


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_a_report_and_an_adapter_that_are_gone_or_damaged_are_made_again(finished: Recipe) -> None:
    out = finished.output
    page, weights = out / "report.html", out / "adapter" / "adapter_model.safetensors"
    figures = page.read_text().split('id="figures"')[1]
    tensors = load_file(weights)
    record = (out / "record.json").read_bytes()
    for harm in (page.unlink, lambda: cut(page)):
        harm()
        assert any("it is written again, from the record" in note for note in again(finished))
        assert page.read_text().split('id="figures"')[1] == figures
    for harm in (
        lambda: shutil.rmtree(out / "adapter"),
        lambda: cut(weights),
        lambda: cut(weights.with_name("adapter_config.json")),
    ):
        harm()
        assert any("exported again" in note for note in again(finished))
        found = load_file(weights)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (out / "record.json").read_bytes() == record
    assert again(finished) == [f"{out} is finished already; remove it to run again"]


def test_an_adapter_without_a_checkpoint_is_missed_aloud(finished: Recipe) -> None:
    shutil.rmtree(finished.output / "adapter")
    shutil.rmtree(finished.output / "checkpoints")
    with pytest.raises(ArtefactError, match=r"no checkpoint of step 2 .* copy the adapter back"):
        run(finished)


def test_a_local_model_that_changed_is_noticed_and_a_touched_one_is_not(
    finished: Recipe, make_tiny_model: Callable[..., torch.nn.Module]
) -> None:
    folder = Path(finished.model)
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))
    (folder / "README.md").write_text("not the model")
    assert "finished already" in again(finished)[0]
    make_tiny_model(1).save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"of which model\.safetensors changed since; set output"):
        run(finished)


def test_a_run_that_is_not_finished_names_its_checkpoint_to_evaluate_and_export(
    finished: Recipe, tmp_path: Path
) -> None:
    shutil.rmtree(finished.output / "adapter")
    recipe = recipe_of(Path(finished.model), tmp_path / "data", finished.output)
    message = "got 1 checkpoint; finish the run, or name that: .*checkpoint-2"
    with pytest.raises(AdapterError, match=message):
        measure_adapter(recipe, finished.output)
    with pytest.raises(AdapterError, match=message):
        export_folder(finished.output, tmp_path / "plain")
