"""`evaluate(base=)`: a model of which every weight may have moved, against a second model."""

from __future__ import annotations

import copy

import pytest
import torch
from evaluation_setup import GAIN, TEXTS, with_lora
from peft import PeftModel
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

import forgetless
from forgetless.errors import ForgetlessError, ForgetlessWarning
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.pair import TunedPair
from forgetless.models.targets import find_targets

KEPT = {"name": "texts", "examples": TEXTS, "metrics": ["nll", "kl"]}


def moved(model: PreTrainedModel, size: float = 0.05) -> PreTrainedModel:
    """A copy with noise in every parameter."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return tuned.eval()


def test_nll_and_kl_are_those_of_two_models(tiny_model, tiny_tokenizer):
    tuned = moved(tiny_model)
    base_nll = tuned_nll = kl = count = 0.0
    with torch.no_grad():
        for text in TEXTS:
            ids = tiny_tokenizer(text, return_tensors="pt").input_ids
            p, q = (log_softmax(m(ids).logits[0].double(), -1) for m in (tiny_model, tuned))
            for position, token in enumerate(ids[0, 1:]):
                base_nll -= float(p[position, token])
                tuned_nll -= float(q[position, token])
                kl += float((p[position].exp() * (p[position] - q[position])).sum())
                count += 1
    with pytest.warns(ForgetlessWarning, match="besides the weights of linear layers"):
        report = forgetless.evaluate(tuned, tiny_tokenizer, base=tiny_model, retention=[KEPT])
    metrics = report.items[0].metrics
    assert metrics["nll"].base.mean == pytest.approx(base_nll / count, rel=1e-5)
    assert metrics["nll"].tuned.mean == pytest.approx(tuned_nll / count, rel=1e-5)
    assert metrics["kl"].tuned.mean == pytest.approx(kl / count, rel=1e-4)
    assert metrics["kl"].tuned.mean > 0.01


def test_an_autocast_around_it_all_does_not_mix_the_two(tiny_model, tiny_tokenizer):
    tuned = moved(tiny_model)
    ids = tiny_tokenizer(TEXTS[0], return_tensors="pt").input_ids
    pair = TunedPair(tuned, tiny_model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [model(ids).logits for model in (tiny_model, tuned)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = [tuned(ids).logits]
        with pair.disable_adapter():
            found.insert(0, tuned(ids).logits)
        found.append(tuned(ids).logits)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[1])
    assert not torch.equal(found[0], found[1])


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Stored in bfloat16, and loaded in float32."""
    return model.to(torch.bfloat16).float()


def test_leakage_of_a_lora_merged_in_bfloat16_is_that_of_the_adapter(
    make_tiny_model, tiny_tokenizer
):
    expected = forgetless.evaluate(
        with_lora(rounded(make_tiny_model())), tiny_tokenizer, retention=[KEPT]
    ).movement
    merged = with_lora(rounded(make_tiny_model())).merge_and_unload()
    for tuned, base in (
        (rounded(copy.deepcopy(merged)), rounded(make_tiny_model())),
        (copy.deepcopy(merged).bfloat16(), rounded(make_tiny_model())),
        (merged, make_tiny_model().bfloat16()),
    ):
        found = forgetless.evaluate(
            tuned, tiny_tokenizer, base=base, retention=[{**KEPT, "metrics": ["nll"]}]
        ).movement
        for name, layer in expected.layers.items():
            assert found.layers[name].leakage == pytest.approx(layer.leakage, rel=0.02), name


def test_leakage_of_full_fine_tuning_from_bfloat16_is_one_in_square_layers(
    tiny_model, tiny_tokenizer
):
    base = tiny_model.bfloat16()
    tuned = moved(copy.deepcopy(base).float(), size=1e-4)
    with pytest.warns(ForgetlessWarning):
        found = forgetless.evaluate(tuned, tiny_tokenizer, base=base, retention=[KEPT]).movement
    square = [layer for name, layer in found.layers.items() if name.endswith(("q_proj", "o_proj"))]
    assert len(square) == 4
    assert all(layer.leakage == pytest.approx(1, abs=1e-4) for layer in square)


def test_leakage_of_a_change_below_the_rounding_is_missing_and_not_none_at_all(
    tiny_model, tiny_tokenizer
):
    tuned = moved(tiny_model, size=1e-4).bfloat16()  # rounding moves it more than the noise did
    base = copy.deepcopy(tiny_model)
    with pytest.warns(ForgetlessWarning):
        report = forgetless.evaluate(tuned, tiny_tokenizer, base=base, retention=[KEPT])
    assert all(layer.leakage is None for layer in report.movement.layers.values())
    assert report.movement.leakage is None
    assert report.movement.update_size > 0
    assert "leakage" not in str(report)


def test_both_models_are_left_bit_for_bit_as_they_were(tiny_model, tiny_tokenizer):
    tuned = moved(tiny_model).train()
    prints = [model_fingerprint(model) for model in (tiny_model, tuned)]
    storages = [[p.data_ptr() for p in model.parameters()] for model in (tiny_model, tuned)]
    tiny_model.requires_grad_(False)
    with pytest.warns(ForgetlessWarning):
        forgetless.evaluate(
            tuned, tiny_tokenizer, base=tiny_model, gain=[GAIN], retention=[KEPT], scale=0.5
        )
    assert [model_fingerprint(model) for model in (tiny_model, tuned)] == prints
    after = [[p.data_ptr() for p in model.parameters()] for model in (tiny_model, tuned)]
    assert after == storages
    assert tuned.training
    assert not tiny_model.training
    assert all(p.requires_grad for p in tuned.parameters())
    assert not any(p.requires_grad for p in tiny_model.parameters())


def test_a_merged_lora_measures_as_the_adapter_does(make_tiny_model, tiny_tokenizer, recwarn):
    adapter = with_lora(make_tiny_model())
    merged = with_lora(make_tiny_model()).merge_and_unload()
    items = {"gain": [GAIN], "retention": [KEPT]}
    expected = forgetless.evaluate(adapter, tiny_tokenizer, **items)
    found = forgetless.evaluate(merged, tiny_tokenizer, base=make_tiny_model(), **items)
    assert not [w for w in recwarn if "movement" in str(w.message)]
    for one, other in zip(found.items, expected.items, strict=True):
        assert one.metrics.keys() == other.metrics.keys()
        for metric in one.metrics:
            ours, theirs = one.metrics[metric], other.metrics[metric]
            assert ours.tuned.mean == pytest.approx(theirs.tuned.mean, rel=1e-4)
            if theirs.base is not None:
                assert ours.base.mean == pytest.approx(theirs.base.mean, rel=1e-6)
        assert one.samples == other.samples
    for name, layer in expected.movement.layers.items():
        for figure in ("update_size", "drift", "leakage", "relative_norm"):
            ours = getattr(found.movement.layers[name], figure)
            assert ours == pytest.approx(getattr(layer, figure), rel=1e-3), (name, figure)
    # Layers without an adapter are measured too: they have not moved.
    others = found.movement.layers.keys() - expected.movement.layers.keys()
    assert others
    assert all(found.movement.layers[name].update_size == 0 for name in others)


def test_refusals_coherence_and_judges_see_the_base_of_a_pair(make_tiny_model, tiny_tokenizer):
    item = {**GAIN, "metrics": ["refusal", "refusal_likelihood", "refusal_margin", "coherent"]}
    arguments = {
        "retention": [item],
        "movement_data": (),
        "judges": {"length": lambda prompts, answers, references: list(map(len, answers))},
    }
    adapter = with_lora(make_tiny_model())
    merged = with_lora(make_tiny_model()).merge_and_unload()
    expected = forgetless.evaluate(adapter, tiny_tokenizer, **arguments).items[0].row_values
    found = forgetless.evaluate(merged, tiny_tokenizer, base=make_tiny_model(), **arguments)
    assert expected.keys() == {*item["metrics"], "length"}
    for name, values in found.items[0].row_values.items():
        assert values.base == pytest.approx(expected[name].base, rel=1e-4), name
        assert values.tuned == pytest.approx(expected[name].tuned, rel=1e-4), name
    # Base and tuned model differ, so that one taken for the other would show.
    margins = expected["refusal_margin"]
    assert margins.tuned != pytest.approx(margins.base, rel=0.1)
    assert expected["length"].tuned != expected["length"].base


@pytest.mark.parametrize("base", ["tiny_model", "tiny_gpt2"])
def test_scale_goes_on_the_change_of_every_weight(base, tiny_tokenizer, request):
    base = request.getfixturevalue(base)
    tuned, half = moved(base), copy.deepcopy(base)
    for target, mine, ours in zip(
        half.parameters(), base.parameters(), tuned.parameters(), strict=True
    ):
        target.data = mine.data + 0.5 * (ours.data - mine.data)
    arguments = {"base": base, "retention": [KEPT]}
    with pytest.warns(ForgetlessWarning):
        found = forgetless.evaluate(tuned, tiny_tokenizer, scale=0.5, **arguments)
    with pytest.warns(ForgetlessWarning):
        expected = forgetless.evaluate(half, tiny_tokenizer, **arguments)
    kl = [report.items[0].metrics["kl"].tuned.mean for report in (found, expected)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-4)
    assert found.movement.drift == pytest.approx(expected.movement.drift, rel=1e-3)


def test_drift_on_calibration_moments_is_that_of_the_dense_update(tiny_model, tiny_tokenizer):
    from forgetless.calibration.calibrate import calibrate
    from forgetless.data.loading import load_rows
    from forgetless.data.spec import parse_data

    rows = [load_rows(spec, tiny_tokenizer) for spec in parse_data(TEXTS)]
    moments = calibrate(tiny_model, tiny_tokenizer, find_targets(tiny_model).targets, rows)
    tuned = moved(tiny_model)
    with pytest.warns(ForgetlessWarning):
        report = forgetless.evaluate(
            tuned,
            tiny_tokenizer,
            base=tiny_model,
            retention=[KEPT],
            calibration_moments=moments,
        )
    name = "model.layers.0.mlp.down_proj"
    base, new = (m.get_submodule(name).weight.detach().double() for m in (tiny_model, tuned))
    moment = moments.of(name).mean_DD().double()
    expected = torch.trace((new - base) @ moment @ (new - base).T) / torch.trace(
        base @ moment @ base.T
    )
    assert report.movement.layers[name].drift_calibration == pytest.approx(
        float(expected), rel=1e-4
    )


def test_figures_of_the_base_are_cached_as_those_of_the_base(tiny_model, tiny_tokenizer, tmp_path):
    """An adapter of the same base finds them, and the other way round."""
    item = {**GAIN, "metrics": ["nll"]}
    arguments = {"gain": [item], "movement_data": (), "base_cache": tmp_path}
    first = forgetless.evaluate(moved(tiny_model), tiny_tokenizer, base=tiny_model, **arguments)
    names = sorted(path.name for path in tmp_path.glob("base-*"))
    assert names
    second = forgetless.evaluate(with_lora(tiny_model), tiny_tokenizer, **arguments)
    assert sorted(path.name for path in tmp_path.glob("base-*")) == names
    assert first.items[0].metrics["nll"].base == second.items[0].metrics["nll"].base


def test_kept_states_of_the_base_give_the_same_figures(tiny_model, tiny_tokenizer, tmp_path):
    arguments = {"retention": [KEPT], "movement_data": (), "base": tiny_model}
    reports = [
        forgetless.evaluate(moved(tiny_model), tiny_tokenizer, base_cache=cache, **arguments)
        for cache in (None, tmp_path, tmp_path)
    ]
    assert reports[0].items == reports[1].items == reports[2].items


def test_a_base_in_another_dtype_computes_in_its_own(tiny_model, tiny_tokenizer):
    base = copy.deepcopy(tiny_model).bfloat16()
    tuned = copy.deepcopy(base).float()
    pair = TunedPair(tuned, base)
    ids = tiny_tokenizer(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = base(ids).logits
        with pair.disable_adapter():
            assert torch.equal(tuned(ids).logits, expected)
        assert tuned(ids).logits.dtype == torch.float32


def test_buffers_that_no_checkpoint_holds_are_the_bases_too(make_tiny_model, tiny_tokenizer):
    base, tuned = make_tiny_model().bfloat16(), make_tiny_model()
    # A cast rounds the frequencies of rotary positions: the two models' are not the same.
    assert not torch.equal(base.model.rotary_emb.inv_freq.float(), tuned.model.rotary_emb.inv_freq)
    ids = tiny_tokenizer(" ".join(TEXTS), return_tensors="pt").input_ids
    with torch.no_grad():
        expected = [base(ids).logits, tuned(ids).logits]
        with TunedPair(tuned, base).disable_adapter():
            assert torch.equal(tuned(ids).logits, expected[0])
        assert torch.equal(tuned(ids).logits, expected[1])


def test_what_trainers_note_in_a_configuration_makes_no_other_model(tiny_model, tiny_tokenizer):
    tuned = moved(tiny_model)
    tuned.config.update(
        {"attention_dropout": 0.5, "initializer_range": 1.0, "unsloth_version": "1", "id2label": {}}
    )
    with pytest.warns(ForgetlessWarning, match="besides"):
        report = forgetless.evaluate(tuned, tiny_tokenizer, base=tiny_model, retention=[KEPT])
    assert report.items[0].metrics["kl"].tuned.mean > 0.01


@pytest.mark.parametrize("which", ["base", "tuned model"])
def test_rounding_of_either_model_is_told(which, tiny_model, tiny_tokenizer):
    tuned, base = copy.deepcopy(tiny_model), tiny_model
    (base if which == "base" else tuned).bfloat16()
    with pytest.warns(ForgetlessWarning, match=f"the {which} computes in bfloat16"):
        forgetless.evaluate(tuned, tiny_tokenizer, base=base, retention=[KEPT], movement_data=())


def test_what_cannot_be_its_base_is_refused_in_one_line(make_tiny_model, tiny_gpt2, tiny_tokenizer):
    def message(model: object, **arguments: object) -> str:
        with pytest.raises(ForgetlessError) as caught:
            forgetless.evaluate(model, tiny_tokenizer, retention=[KEPT], **arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    base, tuned = make_tiny_model(), make_tiny_model(seed=1)
    assert "architecture" in message(tuned, base=tiny_gpt2)
    assert "vocab_size 400, tuned 384" in message(tuned, base=make_tiny_model(vocab_size=400))
    assert "num_hidden_layers" in message(tuned, base=make_tiny_model(num_hidden_layers=1))
    assert "rope" in message(
        tuned, base=make_tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 1.0})
    )
    assert "attention" in message(tuned, base=make_tiny_model(attn_implementation="eager"))
    assert "itself" in message(tuned, base=tuned)
    assert "adapter= or base=, got both" in message(tuned, base=base, adapter="folder")
    assert "or base=" in message(tuned)
    adapted = with_lora(make_tiny_model())
    assert isinstance(adapted, PeftModel)
    assert "merge_and_unload" in message(adapted, base=base)
    assert "without adapters" in message(tuned, base=adapted.get_base_model())
    assert "transformers model as base=" in message(tuned, base=adapted)
