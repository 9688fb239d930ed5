"""The first gradient against autograd's own on the weights, row by row without padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from forgetless.calibration.gradients import collect_gradients
from forgetless.data.tokens import TokenRow, make_batches
from forgetless.errors import CalibrationError
from forgetless.models.targets import find_targets
from training_setup import adapted, token_rows

ROWS = token_rows(10)


def collected(model: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    batches = make_batches(ROWS, batch_size=batch_size, pad_token_id=0, tokens="completion")
    return collect_gradients(model, find_targets(model).targets, batches)


def reference(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of the mean over all completion tokens, (O, D)."""
    total, count = torch.zeros(()), 0
    for row in ROWS:
        ids = torch.tensor([row.input_ids])
        first = max(row.prompt_length, 1)
        logits = model(input_ids=ids).logits[0, first - 1 : -1]
        total = total + cross_entropy(logits, ids[0, first:], reduction="sum")
        count += ids.shape[1] - first
    model.zero_grad()
    (total / count).backward()
    found = {}
    for name, target in find_targets(model).targets.items():
        gradient = target.module.weight.grad
        found[name] = gradient.T if type(target.module).__name__ == "Conv1D" else gradient
    return found


@pytest.mark.parametrize("architecture", ["tiny_model", "tiny_gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_it_is_the_gradient_of_the_mean_loss_however_rows_are_batched(
    request, architecture, batch_size
):
    model = request.getfixturevalue(architecture).eval()
    expected = reference(model)
    model.zero_grad()
    found = collected(model, batch_size)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_the_model_is_left_as_it_was_and_adapters_do_not_count(make_tiny_model):
    expected = collected(make_tiny_model(), 4)
    model = adapted(make_tiny_model(), "plain")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    found = collected(model, 4)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    handles = [m for m in model.modules() if m._forward_hooks]
    assert not handles


def test_rows_without_a_completion_are_no_gradient(make_tiny_model):
    model = make_tiny_model()
    batches = make_batches(
        [TokenRow((5, 6, 7), 3)], batch_size=1, pad_token_id=0, tokens="completion"
    )
    with pytest.raises(CalibrationError, match="expected train rows with a completion"):
        collect_gradients(model, find_targets(model).targets, batches)
