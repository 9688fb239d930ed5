"""What borrows the user's model hands it back as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from forgetless.adapters.attach import attach
from forgetless.calibration.hooks import base_forward
from forgetless.data.self_sampling import sample_self
from forgetless.models.state import left_as_found, random_state_kept
from forgetless.training import restore

CONFIG = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
State = tuple[list[bool], list[bool], list[str], list[list[str]]]


@pytest.fixture
def two_adapters(tiny_gpt2: PreTrainedModel) -> PeftModel:
    """GPT-2, which has dropout, in eval mode inside a new wrapper; the second adapter is active."""
    model = get_peft_model(tiny_gpt2, CONFIG)
    model.add_adapter("second", CONFIG)
    model.set_adapter("second")
    frozen = next(p for n, p in model.named_parameters() if "lora_A.second" in n)
    frozen.requires_grad_(False)
    assert model.training
    assert not tiny_gpt2.training
    return model


def state_of(model: PeftModel) -> State:
    layers = [m for n, m in model.named_modules() if n.endswith("c_attn")]
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        list(model.active_adapters),
        [list(layer.active_adapters) for layer in layers],
    )


def test_modes_gradients_and_adapters_come_back(two_adapters: PeftModel) -> None:
    before = state_of(two_adapters)
    with left_as_found(two_adapters):
        two_adapters.train()
        two_adapters.set_adapter("default")
        assert state_of(two_adapters) != before
    assert state_of(two_adapters) == before


def test_several_active_adapters_come_back_after_an_error(two_adapters: PeftModel) -> None:
    two_adapters.base_model.set_adapter(["default", "second"])
    before = state_of(two_adapters)
    assert before[2] == ["default", "second"]
    with pytest.raises(KeyboardInterrupt), left_as_found(two_adapters):  # noqa: PT012
        two_adapters.eval()
        two_adapters.set_adapter("default")
        raise KeyboardInterrupt
    assert state_of(two_adapters) == before


@pytest.mark.parametrize("borrow", ["calibration", "training", "sampling"])
def test_every_borrower_leaves_a_new_wrapper_around_an_eval_base_as_it_was(
    two_adapters: PeftModel, tiny_tokenizer: object, borrow: str
) -> None:
    before = state_of(two_adapters)
    if borrow == "calibration":
        with base_forward(two_adapters):
            pass
    elif borrow == "training":
        with restore.training_undone(two_adapters):
            two_adapters.train()
    else:
        sample_self(two_adapters, tiny_tokenizer, rows=1, max_length=12, seed=0, batch_size=1)  # type: ignore[arg-type]
    assert state_of(two_adapters) == before


@pytest.mark.parametrize("training", [True, False])
def test_attach_gives_its_layers_the_mode_of_the_model(
    tiny_gpt2: PreTrainedModel, tiny_tokenizer: object, training: bool
) -> None:
    tiny_gpt2.train(training)
    model = attach(tiny_gpt2, tiny_tokenizer, method="lora", rank=2)  # type: ignore[arg-type]
    assert {m.training for m in model.modules()} == {training}
    second = attach(model, tiny_tokenizer, method="lora", rank=2, adapter="second")  # type: ignore[arg-type]
    assert {m.training for m in second.modules()} == {training}
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        same = torch.equal(second(input_ids=ids).logits, second(input_ids=ids).logits)
    assert same is not training


def test_random_states_are_as_before_after_an_error_too() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = draws()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)

    def fail() -> None:
        with random_state_kept():
            torch.manual_seed(5)
            draws()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert draws() == expected
