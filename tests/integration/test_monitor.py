"""Retention watched while training: right figures, no effect on the run, bounds that hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from forgetless import ForgetlessError, ForgetlessWarning, MonitorRetention
from forgetless.adapters.forms import factors
from training_setup import adapted, adapter_state

KEEP = [f"The capital of country {i} is city {i * 7 % 13}." for i in range(6)]
TEXTS = [f"Question: {i} apples and {i}? Answer: {2 * i} apples." for i in range(8)]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


class Recorder(TrainerCallback):
    """A reporter, and the weights after each step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append({**logs, "step": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights[state.global_step] = adapter_state(model)


def make_trainer(
    kind: str, model: PeftModel, tokenizer: Any, folder: Path, recorder: Recorder, **options: Any
) -> Trainer:
    settings = {**COMMON, **options}
    if kind == "sft":
        return SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(folder), gradient_checkpointing=False, **settings),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            eval_dataset=Dataset.from_dict({"text": TEXTS[:2]}),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list([dict(tokenizer(text)) for text in TEXTS]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[recorder],
    )


def figures(model: PeftModel, tokenizer: Any) -> tuple[float, float, float]:
    """KL, rise of cross-entropy and drift, text by text, from float64 logits and plain matrices."""
    kl, rise, count = 0.0, 0.0, 0
    moved: dict[str, list[float]] = {}
    model.eval()
    for text in KEEP:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            tuned = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                base = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
                _add_energies(model, ids, moved)
        kl += float((base.exp() * (base - tuned)).sum())
        rise += float((base - tuned).gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    drift = sum(delta / kept for delta, kept in moved.values()) / len(moved)
    return kl / count, rise / count, drift


def _add_energies(model: PeftModel, ids: Tensor, sums: dict[str, list[float]]) -> None:
    """Add ‖ΔW x‖² and ‖W x‖² of every adapted layer's inputs."""
    seen: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][0]}))
        for name, layer in layers.items()
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        a_RD, b_OR = factors(layer)
        x = seen[name].double()
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += float((x @ (b_OR @ a_RD).double().T).square().sum())
        total[1] += float((x @ layer.get_base_layer().weight.double().T).square().sum())


@pytest.mark.parametrize(
    ("kind", "form", "options"),
    [
        ("sft", "both", {}),
        ("sft", "b", {"bf16": True}),
        ("plain", "plain", {"gradient_accumulation_steps": 2}),
    ],
)
def test_a_monitor_without_a_bound_changes_no_weight_and_no_log(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, kind: str, form: Any, options: Any
) -> None:
    def trained(*, monitored: bool) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        model = adapted(make_tiny_model(attention_dropout=0.2), form)  # draws random numbers
        model.train()
        recorder = Recorder()
        trainer = make_trainer(kind, model, tiny_tokenizer, tmp_path, recorder, **options)
        if monitored:
            trainer.add_callback(MonitorRetention(trainer, KEEP, every=1))
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        return adapter_state(model), lines

    expected, expected_lines = trained(monitored=False)
    weights, lines = trained(monitored=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert lines == expected_lines
    assert len(lines) == 3


def test_the_figures_are_those_of_the_definition_and_reach_every_reporter(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, recorder = adapted(make_tiny_model(), "both"), Recorder()
    trainer = make_trainer("sft", model, tiny_tokenizer, tmp_path, recorder)
    monitor = MonitorRetention(trainer, KEEP, every=4, batch_size=4)
    trainer.add_callback(monitor)
    trainer.train()
    assert [point.step for point in monitor.history] == [0, 4, 6]
    start, _, end = monitor.history
    assert (start.kl, start.ce_rise, start.drift) == (0.0, 0.0, 0.0)
    kl, rise, drift = figures(model, tiny_tokenizer)
    assert end.kl == pytest.approx(kl, rel=1e-4)
    assert end.ce_rise == pytest.approx(rise, rel=1e-3, abs=1e-6)
    assert end.drift == pytest.approx(drift, rel=1e-4)
    logged = [line for line in recorder.logged if "eval_retention_kl" in line]
    assert [line["step"] for line in logged] == [0, 4, 6]
    assert logged[-1]["eval_retention_kl"] == end.kl
    assert logged[-1]["eval_retention_ce_rise"] == end.ce_rise
    assert logged[-1]["eval_retention_drift"] == end.drift


@pytest.mark.parametrize("name", ["kl", "ce_rise", "drift"])
@pytest.mark.parametrize("rollback", [False, True])
def test_a_bound_stops_the_run_and_may_go_back(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, name: str, rollback: bool
) -> None:
    def run(**bounds: Any) -> tuple[PeftModel, Trainer, MonitorRetention, Recorder]:
        model, recorder = adapted(make_tiny_model(), "both"), Recorder()
        trainer = make_trainer("plain", model, tiny_tokenizer, tmp_path, recorder)
        monitor = MonitorRetention(trainer, KEEP, every=2, **bounds)
        trainer.add_callback(monitor)
        trainer.train()
        return model, trainer, monitor, recorder

    free = run()[2]
    values = {point.step: getattr(point, name) for point in free.history}
    assert 0 < values[2] < values[4]
    with pytest.warns(ForgetlessWarning, match=rf"{name} .* above max_{name}=.* at step 4"):
        model, trainer, monitor, recorder = run(
            **{f"max_{name}": (values[2] + values[4]) / 2, "rollback": rollback}
        )
    assert trainer.state.global_step == 4
    assert [point.step for point in monitor.history] == [0, 2, 4]
    kept = recorder.weights[2 if rollback else 4]
    assert all(torch.equal(tensor, kept[key]) for key, tensor in adapter_state(model).items())
    assert recorder.logged[-1]["step"] == 4


def test_a_bound_holds_for_the_best_checkpoint_too(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, recorder = adapted(make_tiny_model(), "both"), Recorder()
    trainer = make_trainer(
        "sft",
        model,
        tiny_tokenizer,
        tmp_path,
        recorder,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    # Stopped and rolled back at step 2; then the trainer loads a checkpoint from before that.
    monitor = MonitorRetention(trainer, KEEP, every=2, max_kl=1e-5, rollback=True)
    trainer.add_callback(monitor)
    with pytest.warns(ForgetlessWarning, match="the weights are those of step 0 again"):
        trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert figures(model, tiny_tokenizer)[0] == 0.0


def test_weights_that_are_not_finite_are_beyond_every_bound(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    class Break(TrainerCallback):
        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    model, recorder = adapted(make_tiny_model(), "plain"), Recorder()
    trainer = make_trainer("plain", model, tiny_tokenizer, tmp_path, recorder)
    trainer.add_callback(Break())
    trainer.add_callback(MonitorRetention(trainer, KEEP, every=1, max_drift=1e9, rollback=True))
    with pytest.warns(ForgetlessWarning, match="drift nan above .* those of step 2 again"):
        trainer.train()
    kept = recorder.weights[2]
    assert all(torch.equal(tensor, kept[key]) for key, tensor in adapter_state(model).items())


def test_what_a_monitor_cannot_watch_is_refused(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer("plain", make_tiny_model(), tiny_tokenizer, tmp_path, Recorder())
    for options, message in (
        ({"every": 0}, "expected every and rows of 1 or more, got 0"),
        ({"max_kl": -0.1}, "max_kl: expected 0 or more, got -0.1"),
        ({"max_drift": float("nan")}, "max_drift: expected 0 or more, got nan"),
        ({"rollback": True}, "rollback needs a bound"),
    ):
        with pytest.raises(ForgetlessError, match=message):
            MonitorRetention(trainer, KEEP, **options)
    trainer.add_callback(MonitorRetention(trainer, KEEP))
    with pytest.raises(ForgetlessError, match="expected a PeftModel"):
        trainer.train()


def test_a_start_beyond_a_bound_is_refused(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = adapted(make_tiny_model(), "plain")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    trainer = make_trainer("plain", model, tiny_tokenizer, tmp_path, Recorder())
    trainer.add_callback(MonitorRetention(trainer, KEEP, max_kl=0.01))
    with pytest.raises(
        ForgetlessError, match=r"kl .* above max_kl=0.01 at step 0; raise the bound"
    ):
        trainer.train()
