"""Full fine-tuning: what it computes, that the base stays, resumes, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from forgetless.calibration.calibrate import calibrate
from forgetless.data.loading import load_rows
from forgetless.data.spec import parse_data
from forgetless.errors import ForgetlessWarning, TrainingError
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.pair import TunedPair
from forgetless.models.targets import find_targets
from forgetless.training.full import copied
from forgetless.training.regularisers import make_regularisers
from forgetless.training.regularisers.base import PreserveData
from forgetless.training.sft import train
from training_setup import options, token_rows

PLAIN = {"scheduler": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0}


def loss_of(model, rows):
    """Mean over completion tokens, row by row, unpadded."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        first = max(row.prompt_length, 1)
        targets = torch.tensor(row.input_ids[first:])
        losses.append(cross_entropy(logits[first - 1 : -1], targets, reduction="none"))
    return torch.cat(losses).mean()


def adamw(model, base, rows, *, steps, rate, weight_decay=0.0, term=None):
    """AdamW of W' - W by its own equations; `base` holds W."""
    parameters = list(model.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    for step in range(1, steps + 1):
        loss = loss_of(model, rows)
        if term is not None:
            loss = loss + term(model)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            named = zip(parameters, base.parameters(), gradients, strict=True)
            for i, (p, w, g) in enumerate(named):
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                change = p - w
                change = change - rate * weight_decay * change
                root = (second[i] / (1 - 0.999**step)).sqrt() + 1e-8
                p.copy_(w + change - rate * first[i] / (1 - 0.9**step) / root)
    return model


def pair_of(base):
    return TunedPair(copy.deepcopy(base).requires_grad_(True), base)


@pytest.mark.parametrize("weight_decay", [0.0, 5.0])
def test_it_is_adamw_on_every_weight_with_decay_to_the_base(
    tiny_model, tiny_tokenizer, tmp_path, weight_decay
):
    base = tiny_model.double()
    before = model_fingerprint(base)
    rows, pair = token_rows(8), pair_of(base)
    facts = train(
        pair,
        tiny_tokenizer,
        rows,
        options=options(
            batch_size=4,
            gradient_accumulation=2,
            max_steps=5,
            learning_rate=1e-3,
            weight_decay=weight_decay,
            **PLAIN,
        ),
        output=tmp_path,
        seed=0,
    )
    expected = adamw(copy.deepcopy(base), base, rows, steps=5, rate=1e-3, weight_decay=weight_decay)
    for (name, ours), theirs in zip(
        pair.tuned.named_parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7, msg=name)
        assert not torch.equal(ours, base.get_parameter(name))
    assert model_fingerprint(base) == before
    assert facts.trainable_parameters == sum(p.numel() for p in base.parameters())


def test_a_bfloat16_base_is_copied_exactly_and_trains_in_float32(
    tiny_model, tiny_tokenizer, tmp_path
):
    base = tiny_model.bfloat16()
    before = {name: p.clone() for name, p in base.named_parameters()}
    pair = copied(base)
    for name, parameter in pair.tuned.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name].float())
    regularisers = make_regularisers(["kl"])
    train(
        pair,
        tiny_tokenizer,
        token_rows(8),
        options=options(max_steps=2, bf16=True, learning_rate=1e-6, regularisers=regularisers),
        output=tmp_path,
        seed=0,
        preserve=PreserveData(rows=token_rows(6, seed=5)),
    )
    assert all(p.dtype == torch.float32 for p in pair.tuned.parameters())
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert all(p.grad is None for p in base.parameters())
    # Rounded to bfloat16, most of these steps would be none.
    weight = pair.tuned.model.layers[0].mlp.down_proj.weight
    assert (weight != before["model.layers.0.mlp.down_proj.weight"].float()).float().mean() > 0.9


def test_drift_pulls_by_the_papers_gradient(tiny_model, tiny_tokenizer, tmp_path):
    base = tiny_model.double()
    specs = parse_data(["The capital of France is Paris.", "Iron is an element of the table."])
    rows = [load_rows(spec, tiny_tokenizer) for spec in specs]
    targets = find_targets(base).targets
    moments = calibrate(base, tiny_tokenizer, targets, rows)

    def term(model):
        total = 0.0
        for name in targets:
            w = base.get_submodule(name).weight.detach()
            m = moments.of(name).mean_DD().double()
            d = model.get_submodule(name).weight - w
            total = total + torch.trace(d @ m @ d.T) / torch.trace(w @ m @ w.T)
        return 50 * total

    pair, train_rows = pair_of(base), token_rows(6)
    train(
        pair,
        tiny_tokenizer,
        train_rows,
        options=options(
            batch_size=6,
            max_steps=3,
            learning_rate=1e-3,
            regularisers=make_regularisers([{"name": "drift", "weight": 50.0}]),
            **PLAIN,
        ),
        output=tmp_path,
        seed=0,
        preserve=PreserveData(moments=moments),
    )
    expected = adamw(copy.deepcopy(base), base, train_rows, steps=3, rate=1e-3, term=term)
    plain = adamw(copy.deepcopy(base), base, train_rows, steps=3, rate=1e-3)
    name = "model.layers.0.mlp.down_proj.weight"
    ours = pair.tuned.get_parameter(name)
    torch.testing.assert_close(ours, expected.get_parameter(name), rtol=0, atol=1e-6)
    assert not torch.allclose(ours, plain.get_parameter(name), rtol=0, atol=1e-5)


def test_kl_and_replay_hold_it_at_the_base(make_tiny_model, tiny_tokenizer, tmp_path):
    def trained(folder, named):
        pair = copied(make_tiny_model())
        facts = train(
            pair,
            tiny_tokenizer,
            token_rows(8),
            options=options(max_steps=12, regularisers=make_regularisers(named)),
            output=tmp_path / folder,
            seed=0,
            preserve=PreserveData(rows=kept, rows_to_train_on=kept),
        )
        ids = torch.tensor([kept[0].input_ids])
        with torch.no_grad():
            tuned, base = (m(ids).logits.log_softmax(-1) for m in (pair.tuned, pair.base))
        return facts, float((base.exp() * (base - tuned)).sum(-1).mean())

    kept = token_rows(8, seed=9)
    _, free = trained("free", [])
    facts, held = trained("held", [{"name": "kl", "weight": 20.0}, "replay"])
    assert held < free / 2
    assert facts.curve[0].terms["kl"] == pytest.approx(0, abs=1e-5)  # it starts at the base
    assert facts.curve[-1].terms["kl"] > 0


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    chosen = options(
        max_steps=12,
        save_steps=3,
        weight_decay=0.1,
        gradient_accumulation=2,
        regularisers=make_regularisers(["kl"]),
    )

    def trained(folder, *callbacks):
        pair = copied(make_tiny_model())
        facts = train(
            pair,
            tiny_tokenizer,
            token_rows(20),
            options=chosen,
            output=tmp_path / folder,
            seed=0,
            preserve=PreserveData(rows=token_rows(8, seed=9)),
            callbacks=callbacks,
        )
        return pair.tuned, facts

    whole, _ = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("broken", Stop())
    resumed, facts = trained("broken")
    assert facts.resumed_from == [6]
    assert model_fingerprint(resumed) == model_fingerprint(whole)
    again, _ = trained("broken")  # trained to its end: loaded, not trained on
    assert model_fingerprint(again) == model_fingerprint(whole)


def test_what_it_is_not_defined_for_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    for named in ("penalty", "project"):
        with pytest.raises(TrainingError, match=f"regulariser {named}: .* got method full"):
            train(
                copied(tiny_model),
                tiny_tokenizer,
                token_rows(8),
                options=options(regularisers=make_regularisers([named])),
                output=tmp_path,
                seed=0,
            )
    with pytest.raises(TrainingError, match="lora_plus_ratio: expected none with method full"):
        train(
            copied(tiny_model),
            tiny_tokenizer,
            token_rows(8),
            options=options(lora_plus_ratio=4.0),
            output=tmp_path,
            seed=0,
        )


def test_a_model_that_did_not_move_is_told(tiny_model, tiny_tokenizer, tmp_path):
    with pytest.warns(ForgetlessWarning, match="the model did not move in 1 steps"):
        train(
            copied(tiny_model),
            tiny_tokenizer,
            token_rows(4),
            options=options(max_steps=1, learning_rate=1e-60),
            output=tmp_path,
            seed=0,
        )
