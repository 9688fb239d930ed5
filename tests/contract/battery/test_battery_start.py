"""Every variant on every kind of layer: starts at the base, and trains what its form promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from contract.battery.specimens import CASES, LAYERS, Case, Specimen, logits, short_name
from contract.battery.variants import VARIANTS, Variant
from forgetless.adapters.forms import adapted_layers

TENSORS = {
    **dict.fromkeys(("plain", "a", "b"), ("lora_A", "lora_B")),
    "both": ("lora_A", "lora_B", "lora_fixed_A", "lora_fixed_B"),
}
TRAINED = {
    "plain": ("lora_A", "lora_B"),
    "a": ("lora_A",),
    "b": ("lora_B",),
    "both": ("lora_A", "lora_B"),
}
# B = 0 hides A from the loss until B has moved.
MOVED_FIRST = {**TRAINED, "plain": ("lora_B",)}


@pytest.fixture
def specimen(
    specimen_of: Callable[[Variant, Case], Specimen], variant: Variant, case: Case
) -> Specimen:
    return specimen_of(variant, case)


def tensors_of(specimen: Specimen, by_form: dict[str, tuple[str, ...]]) -> set[str]:
    """Names that a table gives, in every layer."""
    names = by_form[specimen.method.form]
    return {f"{layer}.{name}" for layer in adapted_layers(specimen.model) for name in names}


every_specimen = pytest.mark.parametrize("variant", VARIANTS, ids=str)
on_every_base = pytest.mark.parametrize("case", CASES, ids=str)


@every_specimen
@on_every_base
def test_every_layer_but_the_head_gets_tensors_of_the_rank_asked_for(specimen: Specimen) -> None:
    layers = adapted_layers(specimen.model)
    prefix = "transformer.h.0." if specimen.case.kind == "conv1d" else ""
    ends = LAYERS[specimen.case.kind]
    found = {n.removeprefix(prefix) if prefix else n.rpartition(".")[2] for n in layers}
    assert found == ends
    assert len(layers) == len(ends)
    assert set(specimen.start) == tensors_of(specimen, TENSORS)
    rank = specimen.method.rank
    for name, tensor in specimen.start.items():
        layer = layers[name.rpartition(".")[0]]
        wide = name.endswith("A")
        expected = (rank, layer.in_features) if wide else (layer.out_features, rank)
        assert tuple(tensor.shape) == expected, name
        assert tensor.dtype == torch.float32, name  # of a bfloat16 base, too
        assert tensor.isfinite().all(), name


@every_specimen
@on_every_base
def test_the_start_is_the_base_bit_for_bit_with_the_adapter_on_and_off(specimen: Specimen) -> None:
    assert torch.equal(specimen.start_logits, specimen.base_logits)
    assert torch.equal(specimen.disabled_logits, specimen.base_logits)


@every_specimen
@on_every_base
def test_what_the_form_promises_trains_in_every_layer_from_the_first_step(
    specimen: Specimen,
) -> None:
    assert specimen.trainable == tensors_of(specimen, TRAINED)
    assert specimen.gradients[0] == tensors_of(specimen, MOVED_FIRST)
    assert specimen.gradients[1] == specimen.trainable


@every_specimen
@on_every_base
def test_training_moves_what_trains_and_nothing_else(specimen: Specimen) -> None:
    assert not torch.equal(specimen.tuned, specimen.base_logits)
    for name, parameter in specimen.parameters().items():
        if ".lora_" in name:
            start = specimen.start[short_name(name)]
            assert torch.equal(parameter, start) is not parameter.requires_grad, name
    assert specimen.base_is_untouched()
    with specimen.model.disable_adapter():
        assert torch.equal(logits(specimen.model), specimen.base_logits)
