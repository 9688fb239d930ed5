"""Each regulariser against its formula, written out densely, and what it does to a training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import linear
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from forgetless.adapters.forms import adapted_layers, factors
from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.data.tokens import TokenRow, make_batches
from forgetless.errors import TrainingError
from forgetless.evaluation.likelihood import compare_rows
from forgetless.linalg.subspace import leading_basis
from forgetless.models.targets import find_targets
from forgetless.training.regularisers import REGULARISERS, make_regularisers
from forgetless.training.regularisers.base import Binding, MicroBatch, PreserveData, Term
from forgetless.training.sft import train
from training_setup import ALL_FORMS, adapted, adapter_state, options, token_rows

ROWS, KEPT = token_rows(16), token_rows(24, seed=9)
FIRST = MicroBatch(step=0, index=0, count=1, stride=1)


def moments_of(model: PeftModel) -> SiteMoments:
    batches = make_batches(KEPT, batch_size=8, pad_token_id=0)
    return collect_moments(model, find_targets(model).targets, batches)


def moved(model: PeftModel, seed: int = 3) -> PeftModel:
    """Every trainable tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def bound(model: PeftModel, tokenizer: Any, options: dict[str, Any], **data: Any) -> Term:
    kept = PreserveData(moments_of(model), KEPT, KEPT)
    (made,) = make_regularisers([options])
    return made.bind(Binding(model, "default", kept, tokenizer, seed=5))


def gradients(model: PeftModel, value: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """ΔW from PEFT's own tensors, with gradients; the table of the forms, written out."""
    found = {}
    for name, layer in adapted_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if hasattr(layer, "lora_fixed_A"):
            a0, b0 = (getattr(layer, f"lora_fixed_{x}")["default"].weight for x in "AB")
            delta = (b0 + b) @ (a0 + a) - b0 @ a0
        else:
            delta = b @ a
        found[name] = delta * layer.scaling["default"]
    return found


@pytest.mark.parametrize("form", ALL_FORMS)
def test_drift_is_the_sum_of_relative_energies_and_so_is_its_gradient(
    make_tiny_model, tiny_tokenizer, form
):
    model = moved(adapted(make_tiny_model(), form))
    term = bound(model, tiny_tokenizer, {"name": "drift", "weight": 2.5})
    value = term.loss(model, FIRST)
    moments, expected = moments_of(model), torch.zeros(())
    for name, delta in deltas(model).items():
        m = moments.of(name).mean_DD()
        w = model.get_base_model().get_submodule(name).base_layer.weight.detach()
        expected = expected + 2.5 * torch.trace(delta @ m @ delta.T) / torch.trace(w @ m @ w.T)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
    ours, theirs = gradients(model, value), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_penalty_is_the_energy_of_what_trains_in_two_subspaces(
    make_tiny_model, tiny_tokenizer, form
):
    model = adapted(make_tiny_model(), form)
    options = {"name": "penalty", "weight": 3.0, "share": 0.25}
    at_the_base = bound(model, tiny_tokenizer, options).loss(model, FIRST)
    if form != "plain":  # nothing of A0 and B0: it never pulls away from the base
        assert float(at_the_base.detach()) == 0.0
        assert not any(g.any() for g in gradients(model, at_the_base).values())
    moved(model)
    value = bound(model, tiny_tokenizer, options).loss(model, FIRST)
    (made,) = make_regularisers([options])
    expected = 0.0
    for layer in adapted_layers(model).values():
        p, q = (made.basis(w, 5) for w in (layer.in_features, layer.out_features))
        assert p.shape[1] == layer.in_features // 4
        torch.testing.assert_close(p.T @ p, torch.eye(p.shape[1]), rtol=0, atol=1e-5)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if form != "b":
            expected += 3 * float((a @ p).detach().square().sum()) / len(a)
        if form != "a":
            expected += 3 * float((b.T @ q).detach().square().sum()) / len(a)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-4)
    assert gradients(model, value)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_kl_is_what_evaluation_measures(make_tiny_model, tiny_tokenizer, form):
    """A batch of all rows: the mean over scored tokens, to float32."""
    model = adapted(make_tiny_model(), form)
    term = bound(model, tiny_tokenizer, {"name": "kl", "weight": 2.0, "batch_size": len(KEPT)})
    assert float(term.loss(model, FIRST)) == 0.0
    moved(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.train()
    value = term.loss(model, FIRST)
    base, _, kl_sum = compare_rows(model, tiny_tokenizer, KEPT)
    assert float(value) == pytest.approx(2 * kl_sum.sum() / base.num_tokens.sum(), rel=1e-4)
    assert model.training
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    found = gradients(model, value)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    half = term.loss(model, MicroBatch(step=0, index=0, count=2, stride=2))
    assert float(half) == pytest.approx(float(value) / 2, rel=1e-5)


@pytest.mark.parametrize("counts", [[2, 2, 2, 2], [2, 2, 2, 1]], ids=["whole", "partial last"])
def test_kl_goes_through_all_rows_before_any_comes_again(make_tiny_model, tiny_tokenizer, counts):
    model = adapted(make_tiny_model())
    term: Any = bound(model, tiny_tokenizer, {"name": "kl", "batch_size": 3})
    drawn = [
        row
        for step, count in enumerate(counts)
        for index in range(count)
        for row in term._drawn(MicroBatch(step, index, count, stride=2))
    ]
    assert len(drawn) == len(set(drawn)) == 3 * sum(counts)
    assert set(drawn) <= set(KEPT)
    again = [row for index in range(2) for row in term._drawn(MicroBatch(4, index, 2, stride=2))]
    assert again != drawn[:6]


def test_kl_of_the_base_to_itself_is_zero_under_autocast_too(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    model = adapted(make_tiny_model())
    facts = run(model, tiny_tokenizer, tmp_path / "run", ["kl"], max_steps=1, bf16=True)
    assert facts.curve[0].terms["kl"] == 0.0


class BareHead(LlamaForCausalLM):
    """Multiplies with the head's weight, and never calls the head."""

    def forward(self, input_ids=None, attention_mask=None, **_: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=linear(hidden, self.lm_head.weight))


def test_a_model_that_does_not_call_its_head_is_refused(make_tiny_model, tiny_tokenizer):
    model = adapted(BareHead(make_tiny_model().config))
    term = bound(model, tiny_tokenizer, {"name": "kl", "batch_size": 4})
    with pytest.raises(TrainingError, match="to call its output embedding"):
        term.loss(model, FIRST)


def test_drift_keeps_no_moment_where_a_is_frozen(make_tiny_model, tiny_tokenizer):
    model = adapted(make_tiny_model(), "b")
    term: Any = bound(model, tiny_tokenizer, {"name": "drift"})
    kept = [
        cell.cell_contents
        for energy in term._energies
        for cell in energy.__closure__
        if isinstance(cell.cell_contents, torch.Tensor)
    ]
    assert kept
    assert {tuple(tensor.shape) for tensor in kept} == {(4, 4)}


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 4), (0.5, 16), (0.75, 48)])
def test_replay_adds_its_share_of_rows_and_repeats_none_before_all_were_there(ratio, count):
    (replay,) = make_regularisers([{"name": "replay", "ratio": ratio}])
    rows = replay.train_rows(ROWS, PreserveData(rows_to_train_on=KEPT), 7)
    assert rows[: len(ROWS)] == ROWS
    added = rows[len(ROWS) :]
    assert len(added) == count
    counts = Counter(added)
    assert set(counts) <= set(KEPT)
    assert max(counts.values()) - min(counts.values() if count >= len(KEPT) else [1]) <= 1
    assert rows == replay.train_rows(ROWS, PreserveData(rows_to_train_on=KEPT), 7)


def test_rows_with_nothing_to_learn_are_not_replayed():
    (replay,) = make_regularisers([{"name": "replay", "ratio": 0.5}])
    cut = TokenRow((4, 5, 6), 3, truncated=True)
    rows = replay.train_rows(ROWS, PreserveData(rows_to_train_on=[cut, *KEPT[:2]]), 7)
    assert set(rows[len(ROWS) :]) == set(KEPT[:2])
    with pytest.raises(TrainingError, match="with a token to learn, got none in 1"):
        replay.train_rows(ROWS, PreserveData(rows_to_train_on=[cut]), 7)


def test_a_projected_a_never_moves_inside_the_preserve_subspace(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    for form in ("plain", "a", "both"):
        model = adapted(make_tiny_model(), form)
        moments, start = moments_of(model), adapter_state(model)
        run(model, tiny_tokenizer, tmp_path / form, [{"name": "project", "energy": 0.9}], moments)
        for name, layer in adapted_layers(model).items():
            basis = leading_basis(moments.of(name).mean_DD(), 0.9)
            a = layer.lora_A["default"].weight
            (key,) = (k for k, t in start.items() if k.endswith(f"{name}.lora_A.default.weight"))
            update = a.detach() - start[key]
            assert float(update.norm()) > 0.01
            assert 0 < basis.shape[1] < basis.shape[0]
            assert float((update @ basis).norm()) < 1e-5 * float(update.norm()), name


def run(
    model: PeftModel,
    tokenizer: Any,
    folder: Path,
    regularisers: list[Any],
    moments: SiteMoments | None = None,
    rows: list[TokenRow] = ROWS,
    **changes: Any,
) -> Any:
    return train(
        model,
        tokenizer,
        rows,
        options=options(regularisers=make_regularisers(regularisers), epochs=3, **changes),
        output=folder,
        seed=0,
        preserve=PreserveData(moments, KEPT, KEPT),
    )


def kept_drift(model: PeftModel, moments: SiteMoments) -> float:
    total = 0.0
    for name, layer in adapted_layers(model).items():
        a, b = factors(layer)
        m = moments.of(name).mean_DD()
        total += float(torch.trace(b @ a @ m @ a.T @ b.T))
    return total


@pytest.mark.parametrize("name", ["drift", "kl"])
def test_a_strong_term_keeps_what_it_names_and_is_logged(
    make_tiny_model, tiny_tokenizer, tmp_path, name
):
    free, held = adapted(make_tiny_model()), adapted(make_tiny_model())
    moments = moments_of(free)
    run(free, tiny_tokenizer, tmp_path / "free", [])
    facts = run(held, tiny_tokenizer, tmp_path / "held", [{"name": name, "weight": 50}], moments)
    figures = []
    for model in (free, held):
        model.eval()
        base, _, kl_sum = compare_rows(model, tiny_tokenizer, KEPT)
        figures.append(
            kept_drift(model, moments) if name == "drift" else kl_sum.sum() / base.num_tokens.sum()
        )
    assert figures[1] < 0.5 * figures[0]
    assert [set(point.terms) for point in facts.curve] == [{name}] * len(facts.curve)
    assert facts.curve[0].terms[name] == 0  # the first step starts at the base
    assert facts.curve[-1].terms[name] > 0


def test_the_logged_loss_is_that_of_the_rows_alone(make_tiny_model, tiny_tokenizer, tmp_path):
    """The penalty is far from 0 at the start, where both runs are the base."""
    points = [
        run(adapted(make_tiny_model()), tiny_tokenizer, tmp_path / str(len(given)), given).curve[0]
        for given in ([], ["penalty"])
    ]
    assert points[1].terms["penalty"] > 1
    assert points[0].loss == pytest.approx(points[1].loss, rel=1e-5)


@pytest.mark.parametrize("given", ["drift", "penalty"])
def test_a_term_of_the_weights_counts_once_a_step_however_rows_are_split(
    make_tiny_model, tiny_tokenizer, tmp_path, given
):
    states, curves = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = adapted(make_tiny_model())
        facts = run(
            model,
            tiny_tokenizer,
            tmp_path / f"{batch_size}",
            [given],
            moments_of(model),
            batch_size=batch_size,
            gradient_accumulation=accumulation,
        )
        states.append(adapter_state(model))
        curves.append(torch.tensor([[p.loss, p.terms[given]] for p in facts.curve]))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=1e-5)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=5e-4, msg=name)


@pytest.mark.parametrize("form", ["plain", "a", "both"])
def test_all_regularisers_together_train_every_form(
    make_tiny_model, tiny_tokenizer, tmp_path, form
):
    model = adapted(make_tiny_model(), form)
    start, moments = adapter_state(model), moments_of(model)
    facts = run(model, tiny_tokenizer, tmp_path / "run", list(REGULARISERS), moments)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            update = parameter.detach() - start[name]
            assert update.any(), f"{name} stood still"
            if ".lora_A." in name:
                layer = name.split(".lora_A.")[0].removeprefix("base_model.model.")
                basis = leading_basis(moments.of(layer).mean_DD(), 0.99)
                assert float((update @ basis).norm()) < 1e-4 * float(update.norm()), name
    assert set(facts.curve[-1].terms) == {"kl", "drift", "penalty"}  # the others add nothing
    assert all(torch.isfinite(t).all() for t in adapter_state(model).values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["drfit"], "did you mean drift"),
        ([{"name": "drift", "weight": -1}], "weight: expected a finite number above 0, got -1"),
        ([{"name": "drift", "wieght": 1}], "unknown option 'wieght'; did you mean weight"),
        ([{"name": "kl", "batch_size": 0}], "batch_size: expected 1 or more, got 0"),
        ([{"name": "replay", "ratio": 1}], "ratio: expected a number between 0 and 1, got 1"),
        ([{"name": "penalty", "share": 1.5}], "share: expected a number between 0 and 1"),
        ([{"name": "project", "energy": 0}], "energy: expected a number between 0 and 1"),
        (["drift", {"name": "drift", "weight": 1}], "expected it once, got it twice"),
        ([{"name": "drift", "weight": 10**400}], "expected a number of at most 1.79769e"),
    ],
)
def test_a_wrong_regulariser_is_one_clear_line(given, message):
    with pytest.raises(TrainingError, match=message) as caught:
        make_regularisers(given)
    assert "\n" not in str(caught.value)


def test_project_is_refused_where_a_is_frozen(make_tiny_model, tiny_tokenizer, tmp_path):
    model = adapted(make_tiny_model(), "b")
    with pytest.raises(TrainingError, match="trains: b, on which it would do nothing"):
        run(model, tiny_tokenizer, tmp_path / "run", ["project"], moments_of(model))


@pytest.mark.parametrize("name", ["drift", "kl", "replay", "project"])
def test_a_regulariser_without_preserve_data_says_so(
    make_tiny_model, tiny_tokenizer, tmp_path, name
):
    model = adapted(make_tiny_model())
    with pytest.raises(TrainingError, match=f"regulariser {name}: expected .* of preserve data"):
        train(
            model,
            tiny_tokenizer,
            ROWS,
            options=options(regularisers=make_regularisers([name])),
            output=tmp_path / "run",
            seed=0,
        )


def test_leading_directions_hold_the_share_asked_for():
    moment = torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0]))
    assert [leading_basis(moment, e).shape[1] for e in (0.5, 0.6, 0.61, 0.9, 0.95)] == [
        1,
        1,
        2,
        2,
        3,
    ]
    assert leading_basis(torch.zeros(4, 4), 0.9).shape == (4, 0)
