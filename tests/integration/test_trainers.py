"""The trainers that people use: `attach` before one, `initialize` between making and `.train()`.

Each trains, resumes where it can, and exports what PEFT alone reloads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import forgetless
from forgetless.adapters.forms import adapted_layers, factors, form_of
from trainer_setup import COMMON, PAIRS, TRAINERS, dpo, loop, plain, sft
from training_setup import adapter_state

IDS = torch.arange(5, 29).reshape(2, 12)
PRESERVE = [
    f"The capital of country {i} is city {i * 7 % 13}, and it rains there." for i in range(40)
]
PLAIN, BOTH = {"name": "lora-null"}, {"name": "sc-lora"}
FORMS = {
    "plain": {"name": "lora"},
    "a": {"name": "sc-lora", "trains": "a"},
    "b": PLAIN,
    "both": BOTH,
}
DPO_BOTH = ("dpo", "both")
pytestmark = pytest.mark.filterwarnings("ignore::forgetless.errors.ForgetlessWarning")


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def attached(model: PreTrainedModel, tokenizer: Any, method: dict[str, Any]) -> PeftModel:
    train = [p + c for p, c in PAIRS]
    return forgetless.attach(
        model, tokenizer, method=method, rank=4, preserve_data=PRESERVE, train_data=train
    )


def initialized(trainer: Trainer, method: dict[str, Any], **more: Any) -> PeftModel:
    return forgetless.initialize(trainer, method=method, preserve_data=PRESERVE, **more)


def lora(**more: Any) -> LoraConfig:
    """As in a user's own script."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
    return LoraConfig(task_type="CAUSAL_LM", **{**settings, **more})


def assert_trained_all_but_the_frozen(
    before: dict[str, Tensor], model: PeftModel, base: dict[str, Tensor]
) -> None:
    """Every layer has an update, what the form freezes and the base stand still."""
    frozen = form_of(model).frozen
    now = adapter_state(model)
    for name, tensor in before.items():
        if any(f".{part}." in name for part in frozen):
            assert torch.equal(now[name], tensor), f"{name} moved"
    for name, layer in adapted_layers(model).items():
        a_RD, b_OR = factors(layer)
        assert (b_OR @ a_RD).any(), f"{name} has no update"
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), f"{name} moved"


def base_state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {f"base_model.model.{n}": p.detach().clone() for n, p in model.named_parameters()}


def assert_exports(model: PeftModel, base: PreTrainedModel, folder: Path) -> None:
    """The exported folder, opened by PEFT alone on a fresh base, answers as the live model."""
    forgetless.export(model, folder)
    reopened = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(reopened), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.compatibility(base="llama", form="{form}", trainer="{kind}", start="attach")
@pytest.mark.parametrize(
    ("kind", "form"),
    # TRL's DPOTrainer copies the adapter it is given into one named `ref`, see below for `both`.
    [(kind, form) for kind in (*TRAINERS, "loop") for form in FORMS if (kind, form) != DPO_BOTH],
)
def test_attach_before_a_trainer(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, kind: str, form: str
) -> None:
    base = make_tiny_model()
    weights = base_state(base)
    model = attached(base, tiny_tokenizer, FORMS[form])
    before = adapter_state(model)
    if kind == "loop":
        loop(model, tiny_tokenizer, tmp_path)
    else:
        TRAINERS[kind](model, tiny_tokenizer, tmp_path).train()
    assert_trained_all_but_the_frozen(before, model, weights)
    assert_exports(model, make_tiny_model(), tmp_path / "exported")


@pytest.mark.compatibility(base="llama", form="{form}", trainer="{kind}", start="initialize")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_lora", [True, False], ids=["peft_config", "bare"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_initialize_between_making_a_trainer_and_training(
    make_tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    kind: str,
    has_lora: bool,
    form: str,
) -> None:
    base = make_tiny_model()
    weights, expected = base_state(base), logits(base)
    if kind == "dpo" and not has_lora:  # a reference is loaded by name, where there is no adapter
        base.config._name_or_path = str(tmp_path / "base")
        base.save_pretrained(tmp_path / "base")
    trainer = TRAINERS[kind](
        base, tiny_tokenizer, tmp_path, peft_config=lora() if has_lora else None
    )
    model = initialized(trainer, FORMS[form], **({} if has_lora else {"rank": 4}))
    assert trainer.model is trainer.model_wrapped is model
    assert torch.equal(logits(model), expected), "does not start at the base"
    model.train()
    before = adapter_state(model)
    trainer.train()
    assert_trained_all_but_the_frozen(before, model, weights)
    assert {layer.scaling["default"] for layer in adapted_layers(model).values()} == {
        2.0 if has_lora else 1.0
    }
    assert_exports(model, make_tiny_model(), tmp_path / "exported")


@pytest.mark.parametrize("method", [BOTH, {"name": "lora-ga"}], ids=["moments", "gradient"])
def test_initialize_and_attach_start_alike_on_the_same_data(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, method: dict[str, object]
) -> None:
    trainer = plain(make_tiny_model(), tiny_tokenizer, tmp_path, peft_config=lora())
    if method is not BOTH:  # its gradient is taken on rows as they are trained: with their end
        ends = [
            {"input_ids": [*tiny_tokenizer(p + c)["input_ids"], tiny_tokenizer.eos_token_id]}
            for p, c in PAIRS
        ]
        trainer.train_dataset = Dataset.from_list(ends)
    late = adapter_state(initialized(trainer, method))
    early = adapter_state(attached(make_tiny_model(), tiny_tokenizer, method))
    assert late.keys() == early.keys()
    for name, tensor in early.items():
        if ".lora_fixed_A." in name:  # row spaces: the sign of a basis vector is nobody's choice
            tensor, other = (torch.linalg.pinv(t) @ t for t in (tensor, late[name]))
        elif ".lora_fixed_B." in name:
            tensor, other = (t @ torch.linalg.pinv(t) for t in (tensor, late[name]))
        else:
            other = late[name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-3)


def test_initialize_draws_nothing_from_the_random_state(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    trainer = sft(make_tiny_model(), tiny_tokenizer, tmp_path)
    before = torch.random.get_rng_state()
    initialized(trainer, BOTH, rank=4)
    assert torch.equal(torch.random.get_rng_state(), before)


def checkpointing(*, reentrant: bool) -> dict[str, Any]:
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


# "aot_eager" traces and differentiates the graph as "inductor" does, without a C++ compiler.
COMPILE = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}


HOW: dict[str, dict[str, Any]] = {
    "gradient checkpointing, reentrant": checkpointing(reentrant=True),
    "gradient checkpointing, not reentrant": checkpointing(reentrant=False),
    "torch.compile (graph and gradients, back end aot_eager)": COMPILE,
}
REENTRANT, NOT_REENTRANT, COMPILED = HOW


@pytest.mark.compatibility(trainer="{kind}", start="{how}", feature="{what}")
@pytest.mark.parametrize(
    ("kind", "how", "what"),
    [
        *(
            (kind, how, what)
            for kind in ("sft", "plain")
            for how in ("attach", "initialize")
            for what in (REENTRANT, NOT_REENTRANT)
        ),
        ("dpo", "initialize", REENTRANT),
        ("dpo", "initialize", NOT_REENTRANT),
        *(
            pytest.param("plain", how, COMPILED, marks=pytest.mark.slow)
            for how in ("attach", "initialize")
        ),
        ("sft", "initialize, no peft_config", REENTRANT),
        ("plain", "initialize, no peft_config", REENTRANT),
    ],
)
def test_how_a_trainer_computes_changes_nothing_of_what_is_learned(
    make_tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    kind: str,
    how: str,
    what: str,
) -> None:
    def trained(**options: Any) -> dict[str, Tensor]:
        model: nn.Module = make_tiny_model(num_hidden_layers=1)
        if how == "attach":
            model = attached(model, tiny_tokenizer, BOTH)
        config = lora() if how == "initialize" else None
        trainer = TRAINERS[kind](model, tiny_tokenizer, tmp_path, peft_config=config, **options)
        if how != "attach":
            initialized(trainer, BOTH, rank=4)
        trainer.train()
        return adapter_state(trainer.model)

    expected = trained(max_steps=HOW[what].get("max_steps", COMMON["max_steps"]))
    for name, tensor in trained(**HOW[what]).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


LAYOUTS: dict[str, dict[str, Any]] = {
    "packing, bfd": {"packing": True, "max_length": 64},
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
    "padding-free batches": {"padding_free": True, "max_length": None},
}


@pytest.mark.compatibility(trainer="sft", start="{how}", feature="{layout}")
@pytest.mark.parametrize("how", ["attach", "initialize"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_and_padding_free_batches(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, layout: str, how: str
) -> None:
    base = make_tiny_model()
    weights = base_state(base)
    if how == "attach":
        model = attached(base, tiny_tokenizer, BOTH)
        trainer = sft(model, tiny_tokenizer, tmp_path, max_steps=2, **LAYOUTS[layout])
    else:
        options = {"peft_config": lora(), "max_steps": 2, **LAYOUTS[layout]}
        trainer = sft(base, tiny_tokenizer, tmp_path, **options)
        model = initialized(trainer, BOTH)
    before = adapter_state(model)
    trainer.train()
    assert_trained_all_but_the_frozen(before, model, weights)
    assert_exports(model, make_tiny_model(), tmp_path / "exported")


@pytest.mark.compatibility(trainer="{kind}", start="{how}", feature="resume")
@pytest.mark.parametrize(
    ("kind", "how", "method"),
    [
        ("sft", "attach", BOTH),
        ("sft", "initialize", BOTH),
        ("sft", "initialize", PLAIN),
        ("dpo", "initialize", BOTH),
        ("dpo", "attach", PLAIN),
        ("plain", "attach", PLAIN),
        ("plain", "initialize", {"name": "sc-lora", "trains": "a"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    make_tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    kind: str,
    how: str,
    method: dict[str, Any],
) -> None:
    def trained(resume: str | None = None) -> tuple[PeftModel, dict[str, Tensor]]:
        model: nn.Module = make_tiny_model()
        if how == "attach":
            model = attached(model, tiny_tokenizer, method)
        trainer = TRAINERS[kind](
            model,
            tiny_tokenizer,
            tmp_path,
            peft_config=lora() if how == "initialize" else None,
            save_strategy="steps",
            save_steps=2,
        )
        if how == "initialize":
            initialized(trainer, method)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, adapter_state(trainer.model)

    _, expected = trained()
    model, resumed = trained(str(tmp_path / "checkpoint-2"))
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    assert_exports(model, make_tiny_model(), tmp_path / "exported")


@pytest.mark.compatibility(
    trainer="sft", start="{how}", feature="early stopping, best checkpoint loaded"
)
@pytest.mark.parametrize("how", ["attach", "initialize"])
@pytest.mark.parametrize("method", [PLAIN, BOTH], ids=lambda m: m["name"])
def test_early_stopping_loads_the_best_checkpoint(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, method: dict[str, Any], how: str
) -> None:
    base = make_tiny_model()
    weights = base_state(base)
    trainer = sft(
        attached(base, tiny_tokenizer, method) if how == "attach" else base,
        tiny_tokenizer,
        tmp_path,
        peft_config=lora() if how == "initialize" else None,
        eval_dataset=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        learning_rate=0.5,  # soon too much
        lr_scheduler_type="constant",
        max_steps=12,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    model = trainer.model if how == "attach" else initialized(trainer, method)
    before = adapter_state(model)
    trainer.train()
    assert trainer.state.global_step < 12
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    assert_trained_all_but_the_frozen(before, model, weights)
    assert_exports(model, make_tiny_model(), tmp_path / "exported")


@pytest.mark.parametrize("method", [PLAIN, {"name": "lora"}, {"name": "sc-lora", "trains": "a"}])
def test_dpo_copies_an_attached_adapter_as_its_reference_which_is_the_base(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, method: dict[str, Any]
) -> None:
    expected = logits(make_tiny_model())
    model = attached(make_tiny_model(), tiny_tokenizer, method)
    trainer = dpo(model, tiny_tokenizer, tmp_path)
    trainer.train()
    assert not torch.equal(logits(model), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


@pytest.mark.compatibility(
    base="llama",
    form="both",
    trainer="dpo",
    start="attach",
    refused="TRL cannot copy an attached adapter of this form as its reference; use initialize",
)
def test_dpo_refuses_to_copy_an_attached_adapter_of_the_form_both(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="forgetless-both"):
        dpo(attached(make_tiny_model(), tiny_tokenizer, BOTH), tiny_tokenizer, tmp_path)


def trained_lora(model: PreTrainedModel) -> PeftModel:
    """As somebody trained it."""
    adapted = get_peft_model(model, lora())
    for layer in adapted_layers(adapted).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    return adapted


@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        ({"init_lora_weights": "pissa"}, PLAIN, "init_lora_weights='pissa', which has changed"),
        ({"rank_pattern": {"q_proj": 2}}, PLAIN, "expected rank 4 of method lora-null, got 2"),
        ({}, {"name": "lora-null", "rank": 8}, "expected rank 8 of method lora-null, got 4"),
        ({}, {"name": "lora-null", "alpha": 4}, "expected the scale alpha / rank = 1 .* got 2"),
        ({"lora_dropout": 0.1}, BOTH, "expected LoRA dropout 0; use trains: a"),
        ({"use_dora": True}, PLAIN, "DoraLinearVariant, not plain LoRA"),
    ],
)
def test_an_adapter_that_cannot_be_started_anew_is_refused(
    make_tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    config: dict[str, Any],
    method: dict[str, Any],
    message: str,
) -> None:
    trainer = plain(make_tiny_model(), tiny_tokenizer, tmp_path, peft_config=lora(**config))
    before = adapter_state(trainer.model)
    with pytest.raises(forgetless.ForgetlessError, match=message):
        initialized(trainer, method)
    after = adapter_state(trainer.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    asked = config.get("init_lora_weights", True)
    assert trainer.model.peft_config["default"].init_lora_weights == asked


def test_a_trainer_that_would_not_train_the_start_is_refused(
    make_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    def refused(trainer: Any, message: str, **more: Any) -> None:
        with pytest.raises(forgetless.ForgetlessError, match=message):
            forgetless.initialize(trainer, **{"preserve_data": PRESERVE, "rank": 4, **more})

    trainer = plain(make_tiny_model(), tiny_tokenizer, tmp_path, peft_config=lora())
    refused(trainer, "needs preserve data: pass preserve_data", preserve_data=None)
    refused(trainer, "expected none, as the trainer's adapter", targets=["q_proj"])
    shared = [PAIRS[0][0] + PAIRS[0][1]]
    refused(trainer, "expected no row in both, got 1 row", method=BOTH, preserve_data=shared)
    trainer.processing_class = None
    refused(trainer, "pass tokenizer=")
    trainer.create_optimizer()
    refused(trainer, "between the trainer's construction and .train")
    refused(make_tiny_model(), "expected a transformers or TRL trainer")
    refused(plain(trained_lora(make_tiny_model()), tiny_tokenizer, tmp_path), "is not trained yet")
    again = plain(attached(make_tiny_model(), tiny_tokenizer, PLAIN), tiny_tokenizer, tmp_path)
    refused(again, "a method has started already")
    lazy = Trainer(
        model_init=lambda: make_tiny_model(),
        args=TrainingArguments(output_dir=str(tmp_path), **COMMON),
        processing_class=tiny_tokenizer,
    )
    refused(lazy, "got model_init")
