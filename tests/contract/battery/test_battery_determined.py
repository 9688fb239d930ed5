"""What a start depends on: the seed where the method draws, and the data; nothing else.

On one kind of layer: how rows are batched is settled before a layer is looked at. In float64, so
that a difference is one of the data read and not of rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from contract.battery.specimens import USUAL, adapter_tensors, attached, make_base, rows
from contract.battery.variants import VARIANTS, Variant
from forgetless.calibration import calibrate
from forgetless.data.tokens import make_batches
from forgetless.errors import MethodError

# Methods that draw random numbers; all others start the same under any seed.
DRAW = {"lora", "lora-wd"}
RANK = 3
NO_SUCH_FILE = "never-read.jsonl"
READING = [variant for variant in VARIANTS if variant.made(RANK).reads]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)

Start = dict[str, Tensor]


@pytest.fixture
def start(tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., Start]:
    """Adapter tensors of a variant on the usual base in float64."""

    def tensors(variant: Variant, **more: Any) -> Start:
        base = make_base(USUAL.kind, torch.float64)
        return adapter_tensors(attached(base, tiny_tokenizer, variant.made(RANK), **more))

    return tensors


def same(first: Start, second: Start) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def determined(start: Start) -> dict[str, Tensor]:
    """A0ᵀ A0 and B0 B0ᵀ: signs of singular vectors, and turns inside a basis, are free."""
    return {n: t.T @ t if n.endswith("A") else t @ t.T for n, t in start.items()}


@every_variant
def test_one_seed_gives_the_same_start_whatever_torchs_own_generator_holds(
    start: Callable[..., Start], variant: Variant
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = start(variant, seed=5)
        torch.manual_seed(2)
        assert same(first, start(variant, seed=5))


@every_variant
def test_another_seed_gives_another_start_only_where_the_method_draws(
    start: Callable[..., Start], variant: Variant
) -> None:
    draws = variant.kind.name in DRAW
    first, second = start(variant, seed=5), start(variant, seed=6)
    assert same(first, second) is not draws


BATCHINGS: dict[str, dict[str, Any]] = {
    "one row a batch": {"batch_size": 1},
    "three rows a batch": {"batch_size": 3},
    "all rows in a batch": {"batch_size": 64},
    "rows in reverse": {
        f"{role}_data": {**rows(role), "examples": rows(role)["examples"][::-1]}
        for role in ("train", "preserve")
    },
}


def reads_first_rows_only(variant: Variant) -> bool:
    """A gradient of a few rows depends on which come first: that is what it was asked for."""
    return 0 < variant.made(RANK).rows_for_gradient < len(rows("train")["examples"])


@pytest.mark.parametrize(
    ("variant", "batching"),
    [
        pytest.param(variant, batching, id=f"{variant}-{batching}")
        for variant in READING
        for batching in BATCHINGS
        if batching != "rows in reverse" or not reads_first_rows_only(variant)
    ],
)
def test_a_start_does_not_depend_on_how_rows_are_batched(
    start: Callable[..., Start], variant: Variant, batching: str
) -> None:
    assert_determined(start(variant), start(variant, **BATCHINGS[batching]))


@pytest.mark.parametrize("variant", [v for v in READING if v.made(RANK).needs], ids=str)
def test_a_start_does_not_depend_on_the_padding_side(
    start: Callable[..., Start], variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = start(variant)
    padded = functools.partial(make_batches, padding_side="left")
    monkeypatch.setattr(calibrate, "make_batches", padded)
    assert_determined(right, start(variant))


@pytest.mark.parametrize("variant", READING, ids=str)
def test_a_start_follows_the_data_that_it_reads(
    start: Callable[..., Start], variant: Variant
) -> None:
    """So that the tests above can fail."""
    first = start(variant)
    for role in variant.made(RANK).reads:
        other = start(variant, **{f"{role}_data": rows(role, count=13)})
        apart = [
            (tensor - determined(first)[name]).norm() > 1e-3 * tensor.norm()
            for name, tensor in determined(other).items()
            if tensor.any()
        ]
        if not reads_first_rows_only(variant):
            assert any(apart)


def assert_determined(first: Start, second: Start) -> None:
    found = determined(second)
    for name, expected in determined(first).items():
        # Norms and rotary angles are float32 in any model.
        assert (found[name] - expected).norm() <= 1e-4 * expected.norm(), name


@every_variant
def test_data_that_a_method_does_not_read_are_never_opened(
    start: Callable[..., Start], variant: Variant
) -> None:
    unread = {"train", "preserve"} - variant.made(RANK).reads
    trapped = start(variant, **{f"{role}_data": NO_SUCH_FILE for role in unread})
    without = start(variant, **{f"{role}_data": None for role in unread})
    assert same(trapped, without)


@pytest.mark.parametrize("variant", READING, ids=str)
def test_data_that_a_method_reads_and_does_not_get_are_asked_for(
    start: Callable[..., Start], variant: Variant
) -> None:
    for role in variant.made(RANK).reads:
        expected = f"method {variant.kind.name} needs {role} data: pass {role}_data"
        with pytest.raises(MethodError, match=f"^{expected}$"):
            start(variant, **{f"{role}_data": None})
