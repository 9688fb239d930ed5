"""`method: full` in a recipe: a run from the data to a model that transformers alone opens."""

from __future__ import annotations

import json
import shutil

import pytest
from run_setup import recipe_of, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless
from forgetless.cli.entry import main
from forgetless.errors import ForgetlessError, MethodError
from forgetless.experiments.progress import Progress
from forgetless.experiments.record import load_record
from forgetless.experiments.run import run
from forgetless.methods import ALL_METHODS, make_method
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.load import load_model


@pytest.fixture
def make_recipe(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "data")

    def make(output: str = "out", training: dict[str, object] | None = None, **changes: object):
        options = {"learning_rate": 1e-3, "max_steps": 8, "batch_size": 4, "save_steps": 3}
        return recipe_of(
            tiny_model_path,
            tmp_path / "data",
            tmp_path / output,
            **{"method": "full", "training": {**options, **(training or {})}, **changes},
        )

    return make


def test_a_run_trains_measures_and_keeps_the_whole_model(make_recipe, tiny_model_path, tmp_path):
    recipe = make_recipe()
    record = load_record(run(recipe))
    folder = tmp_path / "out" / "model"
    assert not (tmp_path / "out" / "adapter").exists()
    tuned = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = load_model(str(tiny_model_path), dtype="float32").model
    assert record.model.fingerprint == model_fingerprint(base)
    assert record.method == {"name": "full"}
    assert record.training.trainable_parameters == base.num_parameters()
    assert record.export["folder"] == "model"
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert any("besides the weights of linear layers" in text for text in record.warnings)
    # The figures are those of the two folders, opened by transformers.
    items = recipe.evaluation
    with pytest.warns(forgetless.ForgetlessWarning):
        again = forgetless.evaluate(
            tuned, tokenizer, base=base, gain=items.gain, retention=items.retention
        )
    for ours, theirs in zip(record.evaluation.items, again.items, strict=True):
        for metric, result in ours.metrics.items():
            assert result.tuned.mean == pytest.approx(theirs.metrics[metric].tuned.mean, rel=1e-5)
    assert record.evaluation.movement.drift == pytest.approx(again.movement.drift, rel=1e-5)
    assert record.evaluation.items[1].metrics["kl"].tuned.mean > 0
    assert [report.scale for report in record.scaled] == [0.5]
    assert (
        record.scaled[0].items[1].metrics["kl"].tuned.mean
        < record.evaluation.items[1].metrics["kl"].tuned.mean
    )
    card = (folder / "README.md").read_text()
    assert "# Fully fine-tuned model for" in card
    assert "every weight, in float32" in card
    assert "base_model_relation: finetune" in card or "a local model" in card
    assert "- lora" not in card


def test_an_interrupted_run_ends_like_one_that_is_not(make_recipe, tmp_path):
    class Stops(Progress):
        def advance(self, done, total, what=""):
            if (done, total) == (5, 8):
                raise KeyboardInterrupt

    whole = load_record(run(make_recipe("whole")))
    with pytest.raises(KeyboardInterrupt):
        run(make_recipe("broken"), progress=Stops())
    broken = load_record(run(make_recipe("broken")))
    assert broken.training.resumed_from == [3]
    folders = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "broken")]
    assert folders[0].read_bytes() == folders[1].read_bytes()
    assert broken.evaluation.items == whole.evaluation.items


def test_a_lost_model_is_exported_again_from_its_checkpoint(make_recipe, tmp_path):
    recipe = make_recipe()
    run(recipe)
    folder = tmp_path / "out" / "model"
    before = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    run(recipe)
    assert (folder / "model.safetensors").read_bytes() == before
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("lost", ["shard", "index"])
def test_a_model_of_which_a_part_is_lost_is_exported_again(make_recipe, tmp_path, lost):
    recipe = make_recipe()
    run(recipe)
    folder = tmp_path / "out" / "model"
    before = (folder / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    run(recipe)
    assert sorted(folder.glob("model-*.safetensors")) == shards  # it is whole, and left alone
    if lost == "shard":
        shards[0].unlink()
    else:
        (folder / "model.safetensors.index.json").write_text("{")
    run(recipe)
    assert (folder / "model.safetensors").read_bytes() == before


def test_settings_that_cannot_be_saved_are_refused_before_anything_is_trained(
    make_recipe, tiny_model_path, tmp_path
):
    (tiny_model_path / "generation_config.json").write_text('{"temperature": 0.5}')
    with pytest.raises(ForgetlessError, match=r"mend its generation_config\.json") as caught:
        run(make_recipe())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_regularisers_that_it_is_defined_for_run(make_recipe):
    training = {"regularisers": ["kl", "replay", {"name": "drift", "weight": 2.0}]}
    record = load_record(run(make_recipe(training=training)))
    assert record.training.curve[-1].terms.keys() == {"kl", "drift"}
    assert record.evaluation.movement.drift_calibration is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "full", "rank": 8}}, "unknown option 'rank'"),
        ({"method": {"name": "full", "alpha": 8}}, "unknown option 'alpha'"),
        ({"targets": ["q_proj"]}, "targets: expected none with method full"),
        ({"quantization": "nf4"}, "quantization: expected none with method full"),
        ({"training": {"lora_plus_ratio": 4}}, "lora_plus_ratio: expected none with method full"),
        ({"training": {"regularisers": ["penalty"]}}, "penalty: .* got method full"),
        ({"training": {"regularisers": ["project"]}}, "project: .* got method full"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make_recipe, changes, message):
    with pytest.raises(ForgetlessError, match=message) as caught:
        make_recipe(**changes)
    assert "\n" not in str(caught.value)


def test_there_is_nothing_to_attach(tiny_model, tiny_tokenizer):
    with pytest.raises(MethodError, match=r"forgetless run.*evaluate\(base="):
        forgetless.attach(tiny_model, tiny_tokenizer, method="full")
    with pytest.raises(MethodError, match="trains every weight"):
        make_method({"name": "full"})
    made = ALL_METHODS["full"]()
    assert made.default_learning_rate == 2e-5
    assert made.default_weight_decay == 0
    assert not made.reads


def status(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_a_whole_model_is_measured_from_the_command_line(
    make_recipe, tmp_path, tiny_model_path, capsys
):
    recipe = make_recipe()
    record = load_record(run(recipe))
    capsys.readouterr()
    path = tmp_path / "out" / "recipe.yaml"
    reports = []
    for chosen in ([], ["--tuned", str(recipe.output / "model")], ["--tuned", str(recipe.output)]):
        assert status(["evaluate", str(path), "evaluation.scales=[]", "--json", *chosen]) == 0
        reports.append(json.loads(capsys.readouterr().out)["reports"][0])
    expected = record.evaluation.items[1].metrics["kl"].tuned.mean
    for report in reports:
        found = report["items"][1]["metrics"]["kl"]["tuned"]["mean"]
        assert found == pytest.approx(expected, rel=1e-6)
    (tmp_path / "empty").mkdir()
    assert status(["evaluate", str(path), "--tuned", str(tmp_path / "empty")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "got a folder without config.json; an adapter is measured with --adapter" in said
    assert status(["export", str(tmp_path / "out"), str(tmp_path / "exported")]) == 2
    assert "lies ready in" in capsys.readouterr().err.replace("\n", " ")
