"""What a method cannot do, it says in one line, and no library's exception comes through."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from contract.battery.specimens import (
    KINDS,
    adapter_tensors,
    attached,
    logits,
    make_base,
    rows,
    smallest_width,
    takes,
)
from contract.battery.variants import VARIANTS, Variant
from forgetless.errors import CalibrationError, ForgetlessError, MethodError
from forgetless.models.targets import find_targets
from tiny_bases import tiny_base

RANK = 3
# Ranks that a layer must hold at once: LoRA-GA takes 2 R directions of the gradient.
RANKS_AT_ONCE = {"lora-ga": 2}
WORDS = re.compile(r"[^\n]+: expected [^\n]+, got [^\n]+; [^\n]+")
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
DEFAULTS = [variant for variant in VARIANTS if not variant.changes]


@pytest.fixture
def refusal(tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """The one line that an attach is refused with."""

    def line(
        base: nn.Module,
        variant: Variant,
        *,
        kind: type[ForgetlessError],
        rank: int = RANK,
        **more: Any,
    ) -> str:
        with pytest.raises(kind) as caught:
            attached(base, tiny_tokenizer, variant.made(rank), **more)
        assert WORDS.fullmatch(str(caught.value)), caught.value
        return str(caught.value)

    return line


@every_variant
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_above_what_a_layer_holds_names_the_layer(
    refusal: Callable[..., str], variant: Variant, kind: str
) -> None:
    base = make_base(kind)
    most = smallest_width(base) // RANKS_AT_ONCE.get(variant.kind.name, 1)
    assert takes(variant.made(most), base)
    said = refusal(base, variant, kind=MethodError, rank=most + 1)
    assert f"rank: expected at most {most}, " in said
    assert any(f"layer {name} " in said for name in find_targets(base).targets)
    assert f"got {most + 1}; lower the rank" in said
    assert not any("lora" in name for name, _ in base.named_modules())  # the base is as it was


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.made(RANK).bottom_roles], ids=str)
def test_too_few_tokens_for_the_weakest_directions_are_refused(
    refusal: Callable[..., str], variant: Variant
) -> None:
    for role in variant.made(RANK).bottom_roles:
        said = refusal(
            make_base("linear"),
            variant,
            kind=CalibrationError,
            **{f"{role}_data": {**rows(role, count=1), "max_length": 10}},
        )
        assert f"{role} tokens" in said


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.made(RANK).rows_for_gradient], ids=str
)
def test_a_gradient_needs_a_completion(refusal: Callable[..., str], variant: Variant) -> None:
    cut = {**rows("train"), "max_length": 2}
    said = refusal(make_base("linear"), variant, kind=CalibrationError, train_data=cut)
    assert "a completion to predict" in said


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_an_encoder_decoder_starts_at_the_base_or_is_refused(
    refusal: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase, variant: Variant
) -> None:
    base = tiny_base("t5")
    if variant.made(RANK).rows_for_gradient:
        said = refusal(base, variant, kind=CalibrationError)
        assert "expected a causal language model" in said
        return
    ids = torch.arange(5, 29).reshape(2, 12)

    def of(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, labels=ids.flip(1)).logits

    expected = of(base)
    many = {f"{role}_data": rows(role, count=60) for role in ("train", "preserve")}
    model = attached(base, tiny_tokenizer, variant.made(RANK), **many)
    assert torch.equal(of(model), expected)


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_the_base_can_be_used_again(
    refusal: Callable[..., str],
    tiny_tokenizer: PreTrainedTokenizerBase,
    variant: Variant,
    value: float,
) -> None:
    base = make_base("linear")
    expected, modules = logits(base), list(base.named_modules())
    name, target = list(find_targets(base).targets.items())[-1]  # no layer after it reads NaN
    kept = target.module.weight.detach().clone()
    with torch.no_grad():
        target.module.weight[0, 0] = value
    said = refusal(base, variant, kind=ForgetlessError)
    assert name in said or "gradient: expected finite values" in said
    with torch.no_grad():
        target.module.weight.copy_(kept)
    assert list(base.named_modules()) == modules
    assert torch.equal(logits(attached(base, tiny_tokenizer, variant.made(RANK))), expected)


@every_variant
def test_a_layer_of_zeros_starts_at_finite_tensors(
    tiny_tokenizer: PreTrainedTokenizerBase, variant: Variant
) -> None:
    base = make_base("linear")
    with torch.no_grad():
        base.get_submodule("model.layers.0.self_attn.o_proj").weight.zero_()
    expected = logits(base)
    model = attached(base, tiny_tokenizer, variant.made(RANK))
    assert torch.equal(logits(model), expected)
    assert all(tensor.isfinite().all() for tensor in adapter_tensors(model).values())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.made(RANK).reads], ids=str)
def test_data_without_rows_are_refused(refusal: Callable[..., str], variant: Variant) -> None:
    for role in variant.made(RANK).reads:
        empty = {f"{role}_data": {**rows(role), "examples": []}}
        refusal(make_base("linear"), variant, kind=ForgetlessError, **empty)
