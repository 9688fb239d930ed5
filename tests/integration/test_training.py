"""Training: the loss it minimises, what it leaves untouched, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import logging
import traceback
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback

from forgetless.adapters.forms import adapted_layers
from forgetless.data.tokens import TokenRow
from forgetless.errors import ArtefactError, ForgetlessWarning, TrainingError
from forgetless.training.callbacks import ReportSteps
from forgetless.training.checkpoint import latest_checkpoint
from forgetless.training.sft import learnable, mean_nll, train
from training_setup import ALL_FORMS, adapted, adapter_state, options, token_rows


def reference_mean_nll(model, rows: list[TokenRow]) -> float:
    """Row by row, unpadded, float64: mean of −log p over completion tokens that follow one."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        log_probability = logits.log_softmax(-1)
        for position in range(max(row.prompt_length, 1), len(row.input_ids)):
            total -= log_probability[position - 1, row.input_ids[position]].item()
            count += 1
    return total / count


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_loss_is_the_mean_over_completion_tokens_of_the_step(
    tiny_model, tiny_tokenizer, tmp_path, batch_size, accumulation
):
    rows = token_rows(8)
    expected = reference_mean_nll(tiny_model, rows)
    facts = train(
        adapted(tiny_model),
        tiny_tokenizer,
        rows,
        options=options(batch_size=batch_size, gradient_accumulation=accumulation, max_steps=1),
        output=tmp_path,
        seed=0,
    )
    assert facts.curve[0].loss == pytest.approx(expected, rel=1e-5)
    assert facts.tokens == sum(len(row.input_ids) for row in rows)


def test_training_lowers_the_loss_and_tells_how_it_went(tiny_model, tiny_tokenizer, tmp_path):
    rows, seen = token_rows(8), []
    model = adapted(tiny_model)
    facts = train(
        model,
        tiny_tokenizer,
        rows,
        options=options(epochs=10, warmup_ratio=0.1),
        output=tmp_path,
        seed=0,
        validation_rows=rows[:3],
        callbacks=[ReportSteps(lambda done, total: seen.append((done, total)))],
    )
    assert facts.steps == 20
    assert facts.epochs == 10
    assert [point.step for point in facts.curve] == list(range(1, 21))
    assert facts.curve[-1].loss < 0.8 * facts.curve[0].loss
    # Warm-up rises from 0 in 2 steps; the cosine ends near 0.
    rates = [point.learning_rate for point in facts.curve]
    assert rates[0] < 5e-3
    assert max(rates) == pytest.approx(5e-3)
    assert rates[-1] < 1e-4
    assert facts.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert seen == [(done, 20) for done in range(21)]
    assert facts.validation_nll == pytest.approx(reference_mean_nll(model, rows[:3]), rel=1e-5)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_only_what_the_form_trains_moves(tiny_model, tiny_tokenizer, tmp_path, form):
    model = adapted(tiny_model, form)
    before = adapter_state(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    prompt = torch.tensor([token_rows(1)[0].input_ids])
    with torch.no_grad(), model.disable_adapter():
        base_logits = model(input_ids=prompt).logits
    train(model, tiny_tokenizer, token_rows(8), options=options(epochs=2), output=tmp_path, seed=0)
    after = adapter_state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trainable
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=prompt).logits, base_logits)


def everything_but_the_adapter(model: PeftModel) -> dict[str, object]:
    base = model.get_base_model()
    return {
        "forwards": [module.__dict__.get("forward") for module in (model, base)],
        "wrapped": "_original_forward" in model.__dict__,
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "config": base.config.to_dict(),
        "generation": base.generation_config.to_dict(),
        "checkpointing": base.is_activation_checkpointing,
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_and_tokenizer_are_left_as_they_were_found(
    tiny_model, tiny_tokenizer, tmp_path, checkpointing
):
    tiny_tokenizer.pad_token = None
    tiny_model.config.eos_token_id = 7
    tiny_model.config.pad_token_id = None
    tiny_model.generation_config.eos_token_id = [7, 9]
    tiny_model.generation_config.pad_token_id = None
    model = adapted(tiny_model, "b").eval()
    before = everything_but_the_adapter(model)
    train(
        model,
        tiny_tokenizer,
        token_rows(8),
        options=options(bf16=True, gradient_checkpointing=checkpointing),
        output=tmp_path,
        seed=0,
    )
    assert everything_but_the_adapter(model) == before
    assert tiny_tokenizer.pad_token is None


def test_a_trained_model_computes_without_autocast(make_tiny_model, tiny_tokenizer, tmp_path):
    model = adapted(make_tiny_model(), "both")
    train(model, tiny_tokenizer, token_rows(8), options=options(bf16=True), output=tmp_path, seed=0)
    fresh = adapted(make_tiny_model(), "both")
    fresh.load_state_dict(model.state_dict())
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, expected = model.eval()(input_ids=prompt), fresh.eval()(input_ids=prompt)
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.logits, expected.logits)
    assert found.past_key_values is not None
    answers = [
        m.generate(input_ids=prompt, max_new_tokens=8, do_sample=False) for m in (model, fresh)
    ]
    assert torch.equal(*answers)


def test_an_error_in_training_leaves_the_model_as_it_was_too(tiny_model, tiny_tokenizer, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise KeyboardInterrupt

    model = adapted(tiny_model).eval()
    before = everything_but_the_adapter(model)
    with pytest.raises(KeyboardInterrupt):
        train(
            model,
            tiny_tokenizer,
            token_rows(8),
            options=options(bf16=True, gradient_checkpointing=True),
            output=tmp_path,
            seed=0,
            callbacks=[Interrupt()],
        )
    assert everything_but_the_adapter(model) == before


def test_weight_decay_reaches_every_trainable_tensor_and_nothing_else(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    """One Adam step of two runs differs by exactly rate × decay × weight, in every tensor."""

    def one_step(decay: float, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
        model = adapted(make_tiny_model())
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                layer.lora_B["default"].weight.fill_(0.5)
        start = adapter_state(model)
        train(
            model,
            tiny_tokenizer,
            token_rows(4),
            options=options(
                weight_decay=decay, max_steps=1, scheduler="constant", warmup_ratio=0.0
            ),
            output=tmp_path / name,
            seed=0,
        )
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        return start, adapter_state(model), trainable

    start, without, trainable = one_step(0.0, "without")
    _, decayed, _ = one_step(0.5, "with")
    assert len(trainable) == len(start)
    for name in trainable:
        pull = without[name] - decayed[name]
        torch.testing.assert_close(pull, 5e-3 * 0.5 * start[name], atol=1e-7, rtol=1e-3)


def test_a_layer_that_ignores_its_adapter_is_named(tiny_model, tiny_tokenizer, tmp_path):
    model = adapted(tiny_model)
    deaf = model.get_base_model().model.layers[1].mlp.up_proj
    deaf.forward = deaf.base_layer.forward
    with pytest.raises(TrainingError, match=r"model\.layers\.1\.mlp\.up_proj: trains nothing"):
        train(model, tiny_tokenizer, token_rows(16), options=options(), output=tmp_path, seed=0)


def test_a_layer_without_trainable_tensor_is_named(tiny_model, tiny_tokenizer, tmp_path):
    model = adapted(tiny_model)
    model.get_base_model().model.layers[0].self_attn.q_proj.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"layers\.0\.self_attn\.q_proj: trains nothing"):
        train(model, tiny_tokenizer, token_rows(16), options=options(), output=tmp_path, seed=0)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tiny_model, tiny_tokenizer, tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                model.get_base_model().model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"step 3: expected a finite loss, got nan"):
        train(
            adapted(tiny_model),
            tiny_tokenizer,
            token_rows(16),
            options=options(),
            output=tmp_path,
            seed=0,
            callbacks=[Poison()],
        )


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(
    tiny_model, tiny_tokenizer, tmp_path
):
    model = adapted(tiny_model)
    before = adapter_state(model)
    weight = adapted_layers(model)["model.layers.0.mlp.up_proj"].lora_B["default"].weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    with pytest.raises(TrainingError, match=r"step 1: expected finite gradients"):
        train(model, tiny_tokenizer, token_rows(8), options=options(), output=tmp_path, seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_state(model).items())


def test_rows_without_a_completion_teach_nothing(make_tiny_model, tiny_tokenizer, tmp_path):
    empty = [TokenRow((5, 6, 7), 3, truncated=True), TokenRow((5,), 0)]
    assert learnable([*empty, TokenRow((5, 6), 1)]) == [TokenRow((5, 6), 1)]
    with pytest.raises(TrainingError, match=r"got none in 2 rows; give rows, or raise max_length"):
        train(
            adapted(make_tiny_model()),
            tiny_tokenizer,
            empty,
            options=options(),
            output=tmp_path,
            seed=0,
        )
    losses = [
        train(
            adapted(make_tiny_model()),
            tiny_tokenizer,
            rows,
            options=options(),
            output=tmp_path / name,
            seed=0,
        ).curve
        for name, rows in (("with", empty + token_rows(8)), ("without", token_rows(8)))
    ]
    assert losses[0] == losses[1]


def test_validation_rows_without_a_completion_do_not_count(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    model = adapted(make_tiny_model())
    empty, rows = [TokenRow((5, 6, 7), 3, truncated=True)], token_rows(5)
    assert mean_nll(model, tiny_tokenizer, empty + rows) == pytest.approx(
        reference_mean_nll(model, rows), rel=1e-5
    )
    with pytest.raises(TrainingError, match=r"validation data: expected rows .* none in 1 rows"):
        mean_nll(model, tiny_tokenizer, empty)
    before = adapter_state(model)
    with pytest.raises(TrainingError, match="validation data"):  # before the first step
        train(
            model,
            tiny_tokenizer,
            rows,
            options=options(),
            output=tmp_path,
            seed=0,
            validation_rows=empty,
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_state(model).items())


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("ratio", "steps"), [(0.03, 1), (0.9, 1), (0.9, 2), (0.99, 3)])
def test_warm_up_never_swallows_all_steps(
    make_tiny_model, tiny_tokenizer, tmp_path, scheduler, ratio, steps
):
    chosen = options(warmup_ratio=ratio, max_steps=steps, scheduler=scheduler)
    assert chosen.num_warmup_steps(8) < steps
    facts = train(
        adapted(make_tiny_model()),
        tiny_tokenizer,
        token_rows(8),
        options=chosen,
        output=tmp_path,
        seed=0,
    )
    assert max(point.learning_rate for point in facts.curve) == pytest.approx(5e-3)


def test_a_run_that_moves_nothing_says_so(make_tiny_model, tiny_tokenizer, tmp_path, recwarn):
    rows = token_rows(8)
    train(
        adapted(make_tiny_model()),
        tiny_tokenizer,
        rows,
        options=options(),
        output=tmp_path / "moves",
        seed=0,
    )
    assert not [found for found in recwarn if found.category is ForgetlessWarning]
    # A denormal rate, below what float32 can add to a weight.
    still = options(learning_rate=1e-45, max_steps=2)
    for _ in range(2):  # as well where the finished run is only loaded
        with pytest.warns(ForgetlessWarning, match="did not move in 2 steps, .* base model; raise"):
            train(
                adapted(make_tiny_model(), "b"),
                tiny_tokenizer,
                rows,
                options=still,
                output=tmp_path / "still",
                seed=0,
            )


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "raised",
    [NO_SPACE, CheckpointException("write", {1: (NO_SPACE, traceback.StackSummary())})],
    ids=["whole", "in parts"],
)
def test_a_full_disk_while_saving_is_one_clear_line(
    raised, tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    saved = torch.save

    def full_disk(*arguments: object, **keywords: object) -> None:
        if latest_checkpoint(tmp_path) is not None:
            raise raised
        saved(*arguments, **keywords)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(
        ArtefactError, match=r"step 4 could not be written .*No space left.* free some"
    ):
        train(
            adapted(tiny_model),
            tiny_tokenizer,
            token_rows(24),
            options=options(save_steps=2),
            output=tmp_path,
            seed=0,
        )
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "training.learning_rate: expected above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "training.learning_rate: expected above 0, got nan"),
        ({"batch_size": 0}, "training.batch_size: expected at least 1, got 0"),
        ({"warmup_ratio": 1.0}, "training.warmup_ratio: expected in 0..1, got 1.0"),
        (
            {"scheduler": "cosin"},
            "training.scheduler: expected cosine or linear or constant, got cosin",
        ),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(TrainingError) as caught:
        options(**change)
    assert str(caught.value).startswith(message)


def test_two_active_adapters_are_refused(tiny_model, tiny_tokenizer, tmp_path):
    model = adapted(tiny_model)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(TrainingError, match="expected one active adapter, got default, second"):
        train(model, tiny_tokenizer, token_rows(4), options=options(), output=tmp_path, seed=0)


def test_training_prints_nothing(tiny_model, tiny_tokenizer, tmp_path: Path, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        train(
            adapted(tiny_model),
            tiny_tokenizer,
            token_rows(8),
            options=options(save_steps=1),
            output=tmp_path,
            seed=0,
        )
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_mean_nll_leaves_the_mode_alone(tiny_model, tiny_tokenizer):
    model = adapted(tiny_model).train()
    mean_nll(model, tiny_tokenizer, token_rows(2))
    assert model.training


@pytest.mark.parametrize("form", ALL_FORMS)
def test_lora_plus_trains_b_at_its_own_rate_and_only_b(
    make_tiny_model, tiny_tokenizer, tmp_path, form
):
    """One step of Adam moves every entry by the rate of its group."""
    rate, ratio = 1e-3, 8.0
    model = adapted(make_tiny_model(), form)
    before = adapter_state(model)
    steps = options(
        learning_rate=rate, max_steps=1, scheduler="constant", warmup_ratio=0.0, max_grad_norm=0.0
    )
    train(
        model,
        tiny_tokenizer,
        token_rows(8),
        options=dataclasses.replace(steps, lora_plus_ratio=ratio),
        output=tmp_path / form,
        seed=0,
    )
    seen = set()
    for name, tensor in adapter_state(model).items():
        moved = (tensor - before[name]).abs()
        if not moved.any():
            continue
        side = "b" if ".lora_B." in name else "a"
        seen.add(side)
        expected = rate * (ratio if side == "b" else 1)
        assert float(moved.max()) == pytest.approx(expected, rel=1e-2), name
    # A of `plain` has no gradient while B is zero.
    assert seen == {"plain": {"b"}, "a": {"a"}, "b": {"b"}, "both": {"a", "b"}}[form]
