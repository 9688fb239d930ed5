"""Checkpoints: a run taken up again equals the unbroken one; half a checkpoint is never read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from forgetless.calibration.engine import collect_moments
from forgetless.data.tokens import make_batches
from forgetless.errors import ArtefactError
from forgetless.models.targets import find_targets
from forgetless.training.checkpoint import (
    ADAPTER_FILE,
    MARKER,
    STARTED,
    latest_checkpoint,
    read_marker,
)
from forgetless.training.identity import describe_adapter, identity_of
from forgetless.training.regularisers import REGULARISERS, make_regularisers
from forgetless.training.regularisers.base import PreserveData
from forgetless.training.sft import train
from training_setup import ALL_FORMS, adapted, adapter_state, options, token_rows

ROWS = token_rows(26)
# Two epochs, a partial last batch, a partial last accumulation: 7 steps an epoch would hide less.
OPTIONS = options(
    batch_size=3, gradient_accumulation=2, epochs=2, save_steps=3, logging_steps=2, weight_decay=0.1
)


class StopAt(TrainerCallback):
    """Ctrl-C after a step, checkpoint or not."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(model, tokenizer, output: Path, *, stop: int | None = None, **changes: object):
    """One `train`; returns its facts, or None where it was stopped."""
    arguments = {"options": OPTIONS, "seed": 3, "train_rows": ROWS, **changes}
    callbacks = [] if stop is None else [StopAt(stop)]
    if stop is None:
        return train(model, tokenizer, output=output, **arguments)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, output=output, callbacks=callbacks, **arguments)
    return None


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    make_tiny_model, tiny_tokenizer, tmp_path, form
):
    whole = adapted(make_tiny_model(), form)
    expected = run(whole, tiny_tokenizer, tmp_path / "whole")
    assert expected.steps == 10
    broken = tmp_path / "broken"
    # Step 4 is one past a checkpoint in the first epoch, 9 is one in the second.
    run(adapted(make_tiny_model(), form), tiny_tokenizer, broken, stop=4)
    run(adapted(make_tiny_model(), form), tiny_tokenizer, broken, stop=9)
    resumed = adapted(make_tiny_model(), form)
    frozen = {name for name, p in resumed.named_parameters() if not p.requires_grad}
    found = run(resumed, tiny_tokenizer, broken)
    assert found.resumed_from == [3, 6]
    assert found == expected.model_copy(update={"resumed_from": [3, 6]})
    state, expected_state = adapter_state(resumed), adapter_state(whole)
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
    assert {name for name, p in resumed.named_parameters() if not p.requires_grad} == frozen


def test_a_resumed_run_with_regularisers_equals_the_unbroken_one_bit_for_bit(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    """Rows of KL follow from the step alone, and projections from the weights before each."""
    kept = token_rows(10, seed=9)

    def regularised(model):
        batches = make_batches(kept, batch_size=5, pad_token_id=0)
        moments = collect_moments(model, find_targets(model).targets, batches)
        return {
            "options": dataclasses.replace(OPTIONS, regularisers=make_regularisers(REGULARISERS)),
            "preserve": PreserveData(moments, kept, kept),
        }

    whole = adapted(make_tiny_model(), "both")
    expected = run(whole, tiny_tokenizer, tmp_path / "whole", **regularised(whole))
    broken = tmp_path / "broken"
    for stop in (4, 8, None):
        resumed = adapted(make_tiny_model(), "both")
        found = run(resumed, tiny_tokenizer, broken, stop=stop, **regularised(resumed))
    assert found.resumed_from == [3, 6]
    assert found == expected.model_copy(update={"resumed_from": [3, 6]})
    state, expected_state = adapter_state(resumed), adapter_state(whole)
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
    less = {"preserve": PreserveData(regularised(whole)["preserve"].moments, kept[1:], kept[1:])}
    with pytest.raises(ArtefactError, match="data"):
        run(resumed, tiny_tokenizer, broken, **{**regularised(resumed), **less})


@pytest.mark.parametrize("form", ["a", "b", "both"])
def test_a_start_solved_with_other_rounding_resumes_from_the_checkpoints_own(
    make_tiny_model, tiny_tokenizer, tmp_path, form
):
    """Another number of threads ends the same eigenproblem in other bits."""
    origin = "moments, method, seed"
    whole = adapted(make_tiny_model(), form)
    run(whole, tiny_tokenizer, tmp_path / "whole", start=origin)
    broken = tmp_path / "broken"
    run(
        adapted(make_tiny_model(), form),
        tiny_tokenizer,
        broken,
        stop=4,
        start="moments, method, seed",
    )
    resumed = adapted(make_tiny_model(), form)
    for name, parameter in resumed.named_parameters():
        if "lora_" in name and not parameter.requires_grad:
            parameter.data += 1e-6 * torch.randn(parameter.shape)
    found = run(resumed, tiny_tokenizer, broken, start=origin)
    assert found.resumed_from == [3]
    state, expected = adapter_state(resumed), adapter_state(whole)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with pytest.raises(ArtefactError, match="differs in start"):
        run(adapted(make_tiny_model(), form), tiny_tokenizer, broken, start="another method")


@pytest.mark.parametrize("max_steps", [5, 7])  # at the end of an epoch, and within one
def test_a_finished_run_is_loaded_and_not_trained_again(
    make_tiny_model, tiny_tokenizer, tmp_path, max_steps
):
    chosen = options(batch_size=3, gradient_accumulation=2, max_steps=max_steps)
    trained = adapted(make_tiny_model(), "both")
    first = run(trained, tiny_tokenizer, tmp_path, options=chosen)
    again = adapted(make_tiny_model(), "both")
    second = run(again, tiny_tokenizer, tmp_path, options=chosen)
    assert second == first  # no step is repeated: it was not resumed
    assert second.resumed_from == []
    assert second.steps == max_steps
    before, after = adapter_state(trained), adapter_state(again)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_half_a_checkpoint_is_passed_over_and_removed(make_tiny_model, tiny_tokenizer, tmp_path):
    run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path, stop=7)
    good, newest = tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"
    assert latest_checkpoint(tmp_path) == newest
    for damage in (
        lambda: (newest / MARKER).unlink(),
        lambda: (newest / "optimizer.pt").unlink(),
        lambda: (newest / MARKER).write_text((newest / MARKER).read_text()[:-20]),
        lambda: (newest / ADAPTER_FILE).write_bytes((newest / ADAPTER_FILE).read_bytes()[:-1]),
    ):
        kept = tmp_path.with_name("kept")
        shutil.copytree(newest, kept)
        damage()
        assert latest_checkpoint(tmp_path) == good
        shutil.rmtree(newest)
        kept.rename(newest)
    assert latest_checkpoint(tmp_path) == newest
    (newest / "rng_state.pth").unlink()
    facts = run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path)
    assert facts.resumed_from == [3]


def test_a_checkpoint_is_marked_only_after_its_last_file(make_tiny_model, tiny_tokenizer, tmp_path):
    run(adapted(make_tiny_model(), "both"), tiny_tokenizer, tmp_path)
    checkpoint = tmp_path / "checkpoint-10"
    marker = read_marker(checkpoint)
    files = [p for p in checkpoint.iterdir() if p.name != MARKER]
    assert marker.files == {path.name: path.stat().st_size for path in files}
    assert (checkpoint / MARKER).stat().st_mtime_ns >= max(p.stat().st_mtime_ns for p in files)
    assert (marker.step, marker.identity.form, marker.identity.rank) == (10, "both", 4)
    # Adapter, optimiser, scheduler, generators, trainer: no model, no tokenizer, no pickle.
    assert {path.name for path in files} <= {
        "README.md",
        "adapter_config.json",
        ADAPTER_FILE,
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }


@pytest.mark.parametrize(
    ("form", "attach", "changes", "message"),
    [
        ("b", {"seed": 1}, {}, r"start \(checkpoint \w+, this run \w+\)"),
        ("both", {"seed": 1}, {}, "start"),
        ("b", {"rank": 5}, {}, r"rank \(checkpoint 4, this run 5\)"),
        ("b", {"alpha": 64}, {}, r"alpha \(checkpoint 8\.0, this run 64\.0\), scaling \("),
        ("b", {"use_rslora": True}, {}, r"differs in scaling \(checkpoint 2\.0, this run 4\.0\)"),
        ("b", {"alpha_pattern": {"q_proj": 9}}, {}, r"differs in scaling \(checkpoint 2\.0, this"),
        ("b", {"form": "both"}, {}, r"form \(checkpoint b, this run both\)"),
        ("plain", {}, {"train_rows": token_rows(26, seed=1)}, "data"),
        ("plain", {}, {"seed": 4}, r"training\.seed \(checkpoint 3, this run 4\)"),
        (
            "plain",
            {},
            {"options": options(learning_rate=1e-3)},
            r"training\.learning_rate \(checkpoint 0\.005, this run 0\.001\)",
        ),
        (
            "plain",
            {},
            {"options": dataclasses.replace(OPTIONS, bf16=True)},
            r"differs in training\.bf16 \(checkpoint False, this run True\)",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    make_tiny_model, tiny_tokenizer, tmp_path, form, attach, changes, message
):
    run(adapted(make_tiny_model(), form), tiny_tokenizer, tmp_path, stop=4)
    other = adapted(make_tiny_model(), **{"form": form, **attach})
    with pytest.raises(ArtefactError, match=message) as caught:
        run(other, tiny_tokenizer, tmp_path, **changes)
    assert "give another output folder, or remove this one" in str(caught.value)


def test_a_checkpoint_of_another_base_is_refused(make_tiny_model, tiny_tokenizer, tmp_path):
    run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path, stop=4)
    with pytest.raises(ArtefactError, match=r"differs in base \("):
        run(adapted(make_tiny_model(seed=1)), tiny_tokenizer, tmp_path)


def test_a_run_is_of_the_hardware_that_decided_its_bf16(make_tiny_model, monkeypatch):
    model = adapted(make_tiny_model())
    found = []
    for fast in (False, True):
        monkeypatch.setattr("forgetless.training.options.has_fast_bf16", lambda _, fast=fast: fast)
        described = describe_adapter(model, "default", None)
        found.append(
            identity_of(described, model.device, data="", options=options(bf16=None), seed=0)
        )
    assert [identity.options["bf16"] for identity in found] == [False, True]
    assert {identity.device for identity in found} == {"cpu"}


@pytest.mark.parametrize("content", ["model.safetensors", "adapter_model.safetensors"])
def test_checkpoints_of_another_program_are_refused_and_never_deleted(
    make_tiny_model, tiny_tokenizer, tmp_path, content
):
    foreign = tmp_path / "checkpoint-500"
    foreign.mkdir()
    (foreign / content).write_bytes(b"weights")
    for complete in (False, True):  # also beside checkpoints of ours
        if complete:
            run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path / "ours", stop=4)
            shutil.copytree(tmp_path / "ours", tmp_path, dirs_exist_ok=True)
        with pytest.raises(ArtefactError, match=r"checkpoint-500: .* another program; choose"):
            run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path)
        assert (foreign / content).read_bytes() == b"weights"


@pytest.mark.parametrize("schema_version", [2, 4, None])
def test_a_marker_of_another_version_is_refused_and_never_deleted(
    make_tiny_model, tiny_tokenizer, tmp_path, schema_version
):
    run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path, stop=4)
    marker = tmp_path / "checkpoint-3" / MARKER
    text = json.dumps({**json.loads(marker.read_text()), "schema_version": schema_version})
    marker.write_text(text)
    with pytest.raises(ArtefactError, match=rf"got {schema_version}, of another version"):
        run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path)
    assert marker.read_text() == text


def test_another_run_deletes_nothing(make_tiny_model, tiny_tokenizer, tmp_path):
    run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path, stop=7)
    (tmp_path / "checkpoint-6" / MARKER).unlink()
    with pytest.raises(ArtefactError, match="differs in rank"):
        run(adapted(make_tiny_model(), rank=2, alpha=8), tiny_tokenizer, tmp_path)
    assert (tmp_path / "checkpoint-6").exists()


def test_every_way_to_leave_half_a_checkpoint_of_ours_is_cleared(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path, stop=7)
    assert (tmp_path / STARTED).read_text().split() == ["3", "6"]
    # A kill while an old checkpoint was deleted, its marker first; one right after mkdir.
    (tmp_path / "checkpoint-3" / MARKER).unlink()
    (tmp_path / "checkpoint-9").mkdir()
    facts = run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path)
    assert facts.resumed_from == [6]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-9",
        "checkpoint-10",
    }


def test_how_often_to_save_and_log_may_change_in_between(make_tiny_model, tiny_tokenizer, tmp_path):
    whole, resumed = adapted(make_tiny_model()), adapted(make_tiny_model())
    run(whole, tiny_tokenizer, tmp_path / "whole")
    run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path / "broken", stop=4)
    changed = options(
        batch_size=3, gradient_accumulation=2, epochs=2, save_steps=5, weight_decay=0.1
    )
    run(resumed, tiny_tokenizer, tmp_path / "broken", options=changed)
    before, after = adapter_state(whole), adapter_state(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("damage", ["missing", "extra"])
def test_tensors_that_peft_would_silently_pass_over_are_an_error(
    make_tiny_model, tiny_tokenizer, tmp_path, damage
):
    run(adapted(make_tiny_model(), "both"), tiny_tokenizer, tmp_path, stop=4)
    checkpoint = tmp_path / "checkpoint-3"
    tensors = load_file(checkpoint / ADAPTER_FILE)
    name = next(name for name in tensors if "lora_fixed_A" in name)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name.replace("fixed_A", "fixed_C")] = tensors[name].clone()
    save_file(tensors, checkpoint / ADAPTER_FILE, {"format": "pt"})
    marker = json.loads((checkpoint / MARKER).read_text())
    marker["files"][ADAPTER_FILE] = (checkpoint / ADAPTER_FILE).stat().st_size
    (checkpoint / MARKER).write_text(json.dumps(marker))
    with pytest.raises(ArtefactError, match=r"got .*lora_fixed_. ?.* only; give another output"):
        run(adapted(make_tiny_model(), "both"), tiny_tokenizer, tmp_path)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_users_own_sft_script_resumes_every_tensor_of_the_form(
    make_tiny_model, tiny_tokenizer, tmp_path, form
):
    """Trainer's own route: PEFT's save_pretrained and load_adapter, without our marker."""
    from datasets import Dataset

    columns = {
        "input_ids": [list(row.input_ids) for row in ROWS],
        "labels": [list(row.input_ids) for row in ROWS],
    }

    def trainer(model):
        arguments = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            save_steps=2,
            learning_rate=5e-3,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        )
        return SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tiny_tokenizer,
        )

    whole = adapted(make_tiny_model(), form)
    trainer(whole).train()
    resumed = adapted(make_tiny_model(), form)
    trainable = {name for name, p in resumed.named_parameters() if p.requires_grad}
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    before, after = adapter_state(whole), adapter_state(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == trainable
