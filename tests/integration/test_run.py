"""A run from recipe to record: what it leaves behind, and what it refuses."""

from __future__ import annotations

import errno
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from run_setup import recipe_of, write_data
from transformers import AutoModelForCausalLM

from forgetless.data.tokens import TokenRow
from forgetless.errors import (
    AdapterError,
    ArtefactError,
    DataError,
    ForgetlessError,
    MethodError,
    RecipeError,
)
from forgetless.experiments import run as run_module
from forgetless.experiments.describe import skipped_notes
from forgetless.experiments.output import Clock
from forgetless.experiments.prepare import hold_out
from forgetless.experiments.progress import Progress
from forgetless.experiments.record import load_record, save_record
from forgetless.experiments.run import calibrate_only, run
from forgetless.recipe import Recipe

PHASES = ["load", "data", "calibrate", "train", "evaluate", "export", "report"]


class Heard(Progress):
    """Remembers what a run tells."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.notes: list[str] = []
        self.commands: list[str] = []
        self.warnings: list[str] = []
        self.steps: dict[str, tuple[int, int]] = {}

    @contextmanager
    def phase(self, name):
        self.phases.append(name)
        yield

    def advance(self, done, total, what=""):
        self.steps[self.phases[-1]] = (done, total)

    def note(self, text):
        self.notes.append(text)

    def command(self, line):
        self.commands.append(line)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def make_recipe(tmp_path, tiny_model_path, monkeypatch):
    """Factory of recipes on tiny data, with a cache of their own."""
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "data")

    def make(output: str = "out", **changes: object) -> Recipe:
        return recipe_of(tiny_model_path, tmp_path / "data", tmp_path / output, **changes)

    return make


def test_a_run_leaves_recipe_adapter_record_and_report(make_recipe, tiny_model_path):
    recipe, heard = make_recipe(), Heard()
    path = run(recipe, progress=heard)
    assert path == recipe.output / "record.json"
    record = load_record(path)
    assert heard.phases == PHASES
    assert list(record.phases) == PHASES
    assert heard.steps["train"] == (30, 30)
    assert record.training.steps == 30
    assert record.training.learning_rate_source == "given"
    assert record.training.validation_nll > 0
    # 40 train rows, 4 of them held out: 30 steps of 4 are more than three epochs.
    assert record.training.epochs == pytest.approx(30 / 9)
    roles = {fact.role: fact for fact in record.data}
    assert {role: fact.rows for role, fact in roles.items()} == {
        "train": 40,
        "preserve": 24,
        "task": 6,
        "facts": 6,
    }
    assert (
        record.model.parameters
        == AutoModelForCausalLM.from_pretrained(tiny_model_path).num_parameters()
    )
    items = {item.name: item for item in record.evaluation.items}
    assert items["task"].metrics["nll"].change.mean < 0
    assert set(items["facts"].metrics) == {"nll", "kl"}
    assert [report.scale for report in record.scaled] == [0.5]
    assert record.evaluation.movement.drift_calibration is not None
    assert record.layers["model.layers.0.mlp.down_proj"].rank == 4
    assert record.export["max_difference"] < 1e-4
    assert record.versions["torch"] == torch.__version__
    assert record.recipe == yaml.safe_load((recipe.output / "recipe.yaml").read_text())
    assert "<html" in (recipe.output / "report.html").read_text()
    assert json.loads((recipe.output / "adapter" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(("method", "scales"), [("lora", [0.25, 0.5]), ("lora-null", [])])
def test_plain_lora_is_measured_turned_down_too_unless_told_otherwise(make_recipe, method, scales):
    items = make_recipe().evaluation
    record = load_record(
        run(
            make_recipe(
                method={"name": method, "rank": 4},
                evaluation={
                    "gain": [item.model_dump(by_alias=True) for item in items.gain],
                    "retention": [item.model_dump(by_alias=True) for item in items.retention],
                    "samples": 0,
                },
            )
        )
    )
    assert [report.scale for report in record.scaled] == scales
    for report in record.scaled:
        measured = {item.name: set(item.metrics) for item in report.items}
        assert measured == {"task": {"nll"}, "facts": {"nll", "kl"}}
        # By rows, so that a comparison resamples the same ones of both.
        for whole, turned_down in zip(record.evaluation.items, report.items, strict=True):
            theirs, ours = whole.row_values["nll"], turned_down.row_values["nll"]
            assert (ours.base, ours.weights) == (theirs.base, theirs.weights)
            assert len(ours.tuned) == len(theirs.tuned)
            assert ours.tuned != theirs.tuned


def test_the_exported_adapter_loads_with_peft_alone_on_the_untouched_base(
    make_recipe, tiny_model_path
):
    record = load_record(run(make_recipe()))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    tuned = PeftModel.from_pretrained(base, record.recipe["output"] + "/adapter")
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        moved = tuned(input_ids=prompt).logits
        with tuned.disable_adapter():
            assert not torch.allclose(moved, tuned(input_ids=prompt).logits, atol=1e-2)


def test_a_finished_run_is_not_done_again(make_recipe):
    path = run(make_recipe(training={"max_steps": 2}))
    before, heard = path.read_bytes(), Heard()
    assert run(make_recipe(training={"max_steps": 2}), progress=heard) == path
    assert heard.phases == []
    assert "is finished already; remove it to run again" in heard.notes[0]
    assert path.read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused_by_the_keys_that_differ(make_recipe):
    run(make_recipe(training={"max_steps": 2}))
    other = make_recipe(training={"max_steps": 3, "save_steps": 1}, seed=1)
    with pytest.raises(RecipeError) as caught:
        run(other)
    message = str(caught.value)
    assert "training.max_steps (2 there, 3 here)" in message
    assert "seed (0 there, 1 here)" in message
    assert "save_steps" not in message
    assert message.endswith("set output= to another folder, or remove this one")


@pytest.mark.parametrize("content", ["folder", "file"])
def test_a_folder_with_other_files_is_left_alone(make_recipe, content):
    recipe = make_recipe()
    if content == "folder":
        recipe.output.mkdir()
        (recipe.output / "thesis.tex").write_text("do not touch")
    else:
        recipe.output.write_text("do not touch")
    with pytest.raises(RecipeError, match="expected an empty folder or one of a run"):
        run(recipe)


def test_ctrl_c_keeps_the_last_checkpoint_and_a_resumed_run_says_so_as_it_begins(make_recipe):
    class Interrupt(Heard):
        def advance(self, done, total, what=""):
            super().advance(done, total, what)
            if self.phases[-1] == "train" and done == 8:
                raise KeyboardInterrupt

    heard = Interrupt()
    with pytest.raises(KeyboardInterrupt):
        run(make_recipe(), progress=heard, resume="forgetless run recipe.yaml seed=0")
    assert heard.commands == ["forgetless run recipe.yaml seed=0"]

    class Told(Heard):
        def advance(self, done, total, what=""):
            super().advance(done, total, what)
            if self.phases[-1] == "train":
                assert "resumed from step 6" in self.notes

    record = load_record(run(make_recipe(), progress=Told()))
    assert record.training.resumed_from == [6]


def test_a_full_disk_is_one_clear_line(make_recipe, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "adapter.safetensors")

    monkeypatch.setattr("forgetless.experiments.product.export", full)
    with pytest.raises(ArtefactError, match=r"adapter\.safetensors: the disk is full; free some"):
        run(make_recipe(training={"max_steps": 1}))
    monkeypatch.undo()


def test_the_methods_own_rate_and_decay_are_used_where_none_is_given(make_recipe):
    recipe = make_recipe(method={"name": "lora-wd", "rank": 4}, training={"max_steps": 1})
    heard = Heard()
    record = load_record(run(recipe, progress=heard))
    assert record.training.learning_rate == 2e-4
    assert "arXiv" in record.training.learning_rate_source
    options = run_module.training_options(recipe, run_module.make_any_method(recipe.method))
    assert options.weight_decay == 0.3
    assert any("does not calibrate" in note for note in heard.notes)


def test_rows_that_train_and_evaluation_share_are_refused(make_recipe, tmp_path):
    data = tmp_path / "data"
    shared = (data / "train.jsonl").read_text().splitlines()[0]
    (data / "gain.jsonl").write_text((data / "gain.jsonl").read_text() + shared + "\n")
    with pytest.raises(DataError, match="train and evaluation data: expected no row in both"):
        run(make_recipe())


def test_our_warnings_reach_the_user_and_the_record_once(make_recipe):
    recipe, heard = make_recipe(training={"max_steps": 1}), Heard()
    short = recipe.train_data[0].model_copy(update={"max_length": 20})
    recipe = recipe.model_copy(update={"train_data": [short], "output": recipe.output / "deeper"})
    record = load_record(run(recipe, progress=heard))
    truncated = [text for text in heard.warnings if "are longer than max_length" in text]
    assert len(truncated) == 1
    assert record.warnings == heard.warnings
    assert next(f for f in record.data if f.role == "train").truncated_rows > 0


def test_held_out_rows_are_never_trained_on_not_even_as_copies():
    rows = [TokenRow((index, index + 1, 2), 1) for index in range(20)]
    kept, held = hold_out([*rows, *rows], 5, seed=1)
    assert len(held) == 5
    assert not {row.input_ids for row in held} & {row.input_ids for row in kept}
    assert hold_out([*rows, *rows], 5, seed=1) == (kept, held)
    assert hold_out(rows, 0, seed=1) == (rows, [])
    with pytest.raises(DataError, match="expected fewer than the 20 train rows, got 20"):
        hold_out(rows, 20, seed=1)


def test_phase_times_add_up_over_attempts(tmp_path: Path):
    state = tmp_path / "state.json"
    first = Clock(state)
    with first.phase("train"):
        pass
    spent = first.phases["train"]
    second = Clock(state)
    assert second.created == first.created
    with pytest.raises(KeyboardInterrupt), second.phase("train"):
        raise KeyboardInterrupt
    assert Clock(state).phases["train"] > spent
    state.write_text('{"phases": ')
    assert Clock(state).phases == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a readable record, got: No such file or directory"),
        ('{"schema_version": 1, "lab', "expected a whole record, got a truncated or damaged"),
        ("[]", "expected a record.json, got something else"),
        ("model: demo\nmethod: lora\n", "expected a record.json, got something else"),
        ('{"schema_version": 99}', "expected record schema 1, got 99"),
        ('{"schema_version": 1}', "expected a complete record, label: Field required"),
    ],
)
def test_a_record_that_cannot_be_used_is_one_clear_line(tmp_path: Path, content, message):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtefactError, match=message) as caught:
        load_record(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_record_survives_its_file(make_recipe):
    path = run(make_recipe(training={"max_steps": 1}))
    record = load_record(path)
    copy = save_record(record, path.with_name("copy.json"))
    assert load_record(copy) == record
    assert [p.name for p in path.parent.glob("*.tmp")] == []


def without_evaluation(make_recipe, **changes):
    """A recipe that is done in a moment."""
    return make_recipe(training={"max_steps": 2, "learning_rate": 1e-3}, evaluation={}, **changes)


def test_a_run_that_failed_on_bad_input_gives_its_folder_up(make_recipe):
    with pytest.raises(MethodError, match="lower the rank"):
        run(without_evaluation(make_recipe, method={"name": "lora", "rank": 999}))
    right = without_evaluation(make_recipe, method={"name": "lora", "rank": 2})
    assert (right.output / "recipe.yaml").exists()
    assert load_record(run(right)).method["rank"] == 2
    with pytest.raises(RecipeError, match=r"method\.rank"):
        run(without_evaluation(make_recipe, method={"name": "lora", "rank": 3}))


def test_a_recipe_that_a_user_wrote_into_the_folder_is_not_overwritten(make_recipe):
    recipe = make_recipe()
    recipe.output.mkdir()
    (recipe.output / "recipe.yaml").write_text("model: mine\n")
    with pytest.raises(RecipeError, match="expected an empty folder or one of this recipe"):
        run(recipe)
    assert (recipe.output / "recipe.yaml").read_text() == "model: mine\n"


def test_data_that_cannot_be_read_are_refused_before_loading_and_claiming(make_recipe, tmp_path):
    recipe, heard = make_recipe(), Heard()
    (tmp_path / "data" / "retention.jsonl").write_text("no json")
    with pytest.raises(DataError, match=r"retention\.jsonl: line 1"):
        run(recipe, progress=heard)
    (tmp_path / "data" / "retention.jsonl").unlink()
    with pytest.raises(DataError, match=r"retention\.jsonl: expected a file"):
        run(recipe, progress=heard)
    assert heard.phases == []
    assert not recipe.output.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandbb", "did you mean wandb?"), ("comet_ml", "expected a logger that is installed")],
)
def test_loggers_that_are_not_there_are_refused_before_loading(make_recipe, name, message):
    heard = Heard()
    with pytest.raises(RecipeError, match=message):
        run(make_recipe(training={"report_to": name}), progress=heard)
    assert heard.phases == []


@pytest.mark.parametrize(
    ("file", "last", "message"),
    [
        ("train", '{"question": "who?"}', r"train\.jsonl: row 40: .* names the field 'answer'"),
        ("preserve", '{"question": "who?", "answer": null}', "'answer' is empty"),
        ("gain", '{"question": "who?", "ans', r"gain\.jsonl: line 7: expected a JSON object"),
        ("retention", "train", "train and evaluation data: expected no row in both"),
    ],
)
def test_a_fault_in_the_last_row_of_a_file_is_told_before_the_model_is_loaded(
    make_recipe, tmp_path, file, last, message
):
    data = tmp_path / "data"
    if last == "train":
        last = (data / "train.jsonl").read_text().splitlines()[-1]
    with (data / f"{file}.jsonl").open("a") as lines:
        lines.write(last + "\n")
    recipe, heard = make_recipe(), Heard()
    with pytest.raises(DataError, match=message):
        run(recipe, progress=heard)
    assert heard.phases == []
    assert not recipe.output.exists()


def test_targets_are_checked_before_the_data(make_recipe):
    heard = Heard()
    with pytest.raises(AdapterError, match="matches no linear layer"):
        run(make_recipe(targets=["nowhere_proj"]), progress=heard)
    assert heard.phases == ["load"]


def test_rows_in_two_roles_are_refused_before_self_is_sampled(make_recipe, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("forgetless.data.loading.sample_self", refuse)
    data = tmp_path / "data"
    (data / "gain.jsonl").write_text((data / "train.jsonl").read_text())
    with pytest.raises(DataError, match="train and evaluation data: expected no row in both"):
        run(make_recipe(preserve_data={"self": True, "limit": 4}))


def test_sampling_is_announced_where_it_is_done(make_recipe):
    recipe = without_evaluation(
        make_recipe,
        method={"name": "lora", "rank": 2},
        preserve_data={"self": True, "limit": 4, "max_length": 16},
    )
    told = "sampling 4 texts of up to 16 tokens from the model"
    first, second = Heard(), Heard()
    run(recipe, progress=first)
    assert first.notes.count(told) == 1
    run(recipe.model_copy(update={"output": recipe.output / "two"}), progress=second)
    assert told not in second.notes


def test_a_finished_run_is_measured_again_where_evaluation_changed(make_recipe, tmp_path):
    training = {"max_steps": 2, "learning_rate": 1e-3}
    first = load_record(run(make_recipe(training=training)))
    item = {"name": "other facts", "path": str(tmp_path / "data" / "retention.jsonl")}
    item |= {"prompt": "Q: {question}", "completion": "{answer}"}
    heard = Heard()
    changed = make_recipe(training=training, evaluation={"retention": [item]}, label="mine")
    again = load_record(run(changed, progress=heard))
    assert "is trained already; it is measured again" in heard.notes[0]
    assert [found.name for found in again.evaluation.items] == ["other facts"]
    assert again.label == "mine"
    assert again.training.curve == first.training.curve
    assert again.recipe == yaml.safe_load((changed.output / "recipe.yaml").read_text())

    renamed, quiet = changed.model_copy(update={"label": "yours"}), Heard()
    assert load_record(run(renamed, progress=quiet)).label == "yours"
    assert quiet.phases == []

    for marker in (changed.output / "checkpoints").glob("*/forgetless.json"):
        marker.unlink()
    with pytest.raises(RecipeError, match="expected a checkpoint to measure again"):
        run(make_recipe(training=training))


def test_a_data_file_that_changed_is_not_taken_for_the_one_of_the_record(make_recipe, tmp_path):
    training, data = {"max_steps": 2, "learning_rate": 1e-3}, tmp_path / "data"
    recipe = make_recipe(training=training)
    before = load_record(run(recipe))
    (data / "train.jsonl").touch()
    heard = Heard()
    run(recipe, progress=heard)
    assert heard.phases == []

    lines = (data / "retention.jsonl").read_text().splitlines()
    (data / "retention.jsonl").write_text("\n".join(lines[:-1]))
    after = load_record(run(recipe))
    assert [item.rows for item in before.evaluation.items] == [6, 6]
    assert [item.rows for item in after.evaluation.items] == [6, 5]

    (data / "train.jsonl").write_text((data / "train.jsonl").read_text().replace("fox", "ox"))
    with pytest.raises(RecipeError, match=r"train\.jsonl: expected the file .* changed since"):
        run(recipe)


def test_a_folder_that_cannot_be_made_is_one_clear_line(make_recipe):
    with pytest.raises(ArtefactError, match=r"/proc/nowhere.*: could not be read or written"):
        run(make_recipe().model_copy(update={"output": Path("/proc/nowhere/out")}))


def test_usual_skipped_layers_are_counted_and_unusual_ones_named():
    skipped = {"embed": "embedding", "experts": "fused 3-D weights", "lm_head": "output head"}
    assert skipped_notes(skipped) == [
        "2 layers skipped (embedding, output head)",
        "layer experts is skipped: fused 3-D weights",
    ]
    assert skipped_notes({}) == []


@pytest.mark.parametrize(
    ("method", "given"),
    [("lora", ["drift", "kl"]), ("lora", {"name": "replay", "ratio": 0.5}), ("eva", "project")],
)
def test_a_run_with_regularisers_calibrates_for_them_and_records_their_terms(
    make_recipe, method, given
):
    recipe = make_recipe(
        method={"name": method, "rank": 4}, training={"max_steps": 4} | {"regularisers": given}
    )
    record = load_record(run(recipe))
    names = [one["name"] for one in recipe.training.regularisers]
    assert record.label == " + ".join([method, *names])
    assert set(record.training.curve[-1].terms) == set(names) & {"drift", "kl"}
    calibrated = record.evaluation.movement.drift_calibration is not None
    assert calibrated == ("replay" not in names)


def test_a_recipe_whose_regulariser_lacks_data_or_a_form_is_refused(make_recipe):
    with pytest.raises(RecipeError, match="as the regulariser drift needs it, got none"):
        make_recipe(method="lora", preserve_data=[], training={"regularisers": "drift"})
    with pytest.raises(ForgetlessError, match="project: expected a method that trains a or both"):
        make_recipe(training={"regularisers": ["project"]})
    with pytest.raises(ForgetlessError, match="did you mean drift"):
        make_recipe(training={"regularisers": ["drfit"]})


def _as_an_earlier_version_wrote(tree: dict) -> dict:
    """A recipe without the keys that came later."""
    assert tree.pop("quantization") == "none"
    assert tree["calibration"].pop("source_weights") == "tokens"
    assert tree["training"].pop("regularisers") == []
    assert tree["training"].pop("lora_plus_ratio") is None
    assert tree["evaluation"].pop("lm_eval") is None
    for side in ("gain", "retention"):
        for item in tree["evaluation"][side]:
            assert item.pop("redistributable") is True
            assert item.pop("refuses_with") == item.pop("complies_with") == []
    return tree


def test_a_folder_of_an_earlier_version_lacks_the_newer_keys_and_is_taken_up(make_recipe):
    recipe = make_recipe()
    run(recipe)
    written, kept = recipe.output / "recipe.yaml", recipe.output / "record.json"
    tree = _as_an_earlier_version_wrote(yaml.safe_load(written.read_text()))
    written.write_text(yaml.safe_dump(tree))
    record = json.loads(kept.read_text())
    record["recipe"] = tree
    kept.write_text(json.dumps(record))
    before = kept.stat().st_mtime_ns
    run(recipe)
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"differs in training\.regularisers"):
        run(make_recipe(training={"regularisers": ["kl"]} | tree["training"]))


def test_checkpoints_do_not_name_options_that_are_not_set(make_recipe):
    """What a checkpoint of before these options says of its run: it must go on."""
    recipe = make_recipe()
    run(recipe)
    marker = next(recipe.output.glob("checkpoints/*/forgetless.json"))
    options = json.loads(marker.read_text())["identity"]["options"]
    assert not {"regularisers", "lora_plus_ratio"} & set(options)


@pytest.mark.parametrize(
    ("method", "origin"), [("lora-null", "35e30a95aec58e3d"), ("sc-lora", "1bf910e1888d8ad0")]
)
def test_a_start_is_named_as_by_the_first_version(make_recipe, method, origin):
    """Hashes that the first version gave these starts, so that its checkpoints are known again."""
    attached = calibrate_only(make_recipe(method={"name": method, "rank": 4}))
    assert attached.origin == origin


def test_sources_of_equal_weight_are_another_start(make_recipe):
    """Of one source the weight says nothing, and the start is the same."""

    def origin(folder: str, weights: str, *, is_split: bool) -> str:
        spec = make_recipe().resolved()["preserve_data"][0]
        parts = [{**spec, "rows": [0, 10]}, {**spec, "rows": [10, 24]}]
        recipe = make_recipe(
            preserve_data=parts if is_split else spec,
            calibration={"source_weights": weights},
            output=folder,
        )
        return calibrate_only(recipe).origin

    folder = str(make_recipe().output)
    by_tokens = origin(f"{folder}-1", "tokens", is_split=True)
    assert origin(f"{folder}-2", "equal", is_split=True) != by_tokens
    assert origin(f"{folder}-3", "equal", is_split=False) == "35e30a95aec58e3d"


@pytest.mark.parametrize(("regularisers", "is_other"), [([], False), ([{"name": "drift"}], True)])
@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, {"name": "full"}])
def test_weights_of_sources_make_another_start_only_where_moments_are_read(
    make_recipe, method, regularisers, is_other
):
    spec = make_recipe().resolved()["preserve_data"][0]
    origins = {
        calibrate_only(
            make_recipe(
                method=method,
                preserve_data=[{**spec, "rows": [0, 10]}, {**spec, "rows": [10, 24]}],
                calibration={"source_weights": weights},
                training={"regularisers": regularisers},
                output=f"{make_recipe().output}-{weights}",
            )
        ).origin
        for weights in ("tokens", "equal")
    }
    assert (len(origins) == 2) == is_other
