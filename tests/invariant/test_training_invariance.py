"""Configurations of training that must agree, agree."""

from __future__ import annotations

import pytest
import torch

from forgetless.training import trainer
from forgetless.training.sft import train
from training_setup import ALL_FORMS, adapted, adapter_state, options, token_rows

ROWS = token_rows(32)


@pytest.fixture
def trained(make_tiny_model, tiny_tokenizer, tmp_path):
    """Train a fresh adapter of a form; returns losses and adapter tensors."""

    def run(name: str, form: str = "both", *, seed: int = 0, rows=ROWS, **changes: object):
        model = adapted(make_tiny_model(), form)
        facts = train(
            model,
            tiny_tokenizer,
            rows,
            options=options(**{"batch_size": 8, "epochs": 3, **changes}),
            output=tmp_path / name,
            seed=seed,
        )
        return torch.tensor([point.loss for point in facts.curve]), adapter_state(model)

    return run


@pytest.mark.parametrize("form", ALL_FORMS)
def test_eight_rows_at_once_equal_four_times_two(trained, form):
    """Rows are of unlike lengths: a mean of means would differ."""
    losses, weights = trained("at once", form)
    accumulated_losses, accumulated = trained(
        "accumulated", form, batch_size=2, gradient_accumulation=4
    )
    assert len(losses) == 12
    torch.testing.assert_close(losses, accumulated_losses, rtol=2e-4, atol=0)
    for name, tensor in weights.items():
        torch.testing.assert_close(accumulated[name], tensor, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("form", ["plain", "both"])
def test_gradient_checkpointing_changes_nothing(trained, form):
    losses, weights = trained("off", form)
    checkpointed_losses, checkpointed = trained("on", form, gradient_checkpointing=True)
    torch.testing.assert_close(losses, checkpointed_losses, rtol=1e-6, atol=0)
    for name, tensor in weights.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("form", ["plain", "both"])
@pytest.mark.parametrize("bf16", [False, True])
def test_our_loss_on_chosen_positions_is_trls_loss(trained, monkeypatch, form, bf16):
    """To rounding; in bf16 TRL's gradient is float32, and the courses drift apart."""
    losses, weights = trained("chosen", form, bf16=bf16)
    monkeypatch.setattr(trainer, "LARGEST_LOGITS", 0)
    trl_losses, trl_weights = trained("trl", form, bf16=bf16)
    assert not torch.equal(losses, trl_losses)  # it was another route
    torch.testing.assert_close(losses, trl_losses, rtol=5e-3 if bf16 else 2e-4, atol=0)
    if not bf16:
        for name, tensor in weights.items():
            torch.testing.assert_close(trl_weights[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_a_seed_gives_the_same_run_and_another_seed_another_order(trained):
    losses, weights = trained("first", seed=5)
    again_losses, again = trained("second", seed=5)
    other_losses, _ = trained("third", seed=6)
    assert torch.equal(losses, again_losses)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(losses, other_losses)


def test_global_random_state_before_training_does_not_matter(trained):
    torch.manual_seed(1)
    losses, _ = trained("first")
    torch.manual_seed(2)
    torch.rand(100)
    again, _ = trained("second")
    assert torch.equal(losses, again)


def test_logging_and_saving_change_no_weight(trained):
    _, weights = trained("often", logging_steps=1, save_steps=2)
    _, again = trained("rarely", logging_steps=7, save_steps=100)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
