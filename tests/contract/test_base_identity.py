"""An adapter knows its base: by its weights where we exported it, by name where others did."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from forgetless.adapters.export import export
from forgetless.adapters.load import load_adapter
from forgetless.errors import AdapterError, ForgetlessWarning
from forgetless.experiments.exporting import export_folder
from forgetless.models.fingerprint import model_fingerprint, rounded_fingerprint

Made = tuple[Path, Path, Path]


@pytest.fixture
def made(make_tiny_model: Callable[..., nn.Module], save_model: Callable[..., Path]) -> Made:
    """Two bases of the same shapes, and an export of an adapter of the first."""
    mine, other = (save_model(make_tiny_model(seed), f"m{seed}") for seed in (0, 1))
    base = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.bfloat16)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    return mine, other, export(adapted, mine.parent / "adapter")


def opened(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> None:
    load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_opens_on_its_base_in_any_dtype_and_on_no_other(
    made: Made, dtype: torch.dtype
) -> None:
    mine, other, adapter = made
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgetlessWarning)
        opened(mine, adapter, dtype)
        opened(mine.rename(mine.parent / "moved"), adapter, dtype)
    with pytest.raises(AdapterError, match=r"expected its own base .*m0.* got .*m1.*; load the"):
        opened(other, adapter, dtype)


def test_an_export_on_another_base_is_refused(made: Made) -> None:
    _, other, adapter = made
    with pytest.raises(AdapterError, match="expected its own base"):
        export_folder(adapter, adapter.parent / "out", model=str(other))


def test_where_weights_cannot_be_compared_a_base_of_another_name_is_warned_of(made: Made) -> None:
    mine, other, adapter = made
    with pytest.warns(UserWarning, match=r"was trained on .*m0, and is opened on .*m1"):
        opened(other, adapter, torch.float16)
    base = AutoModelForCausalLM.from_pretrained(mine)
    theirs = mine.parent / "theirs"
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(theirs))
    with pytest.warns(UserWarning, match=r"was trained on .*m0, and is opened on .*m1"):
        opened(other, theirs)
    copy = mine.parent / "copies" / "M0"
    copy.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgetlessWarning)
        opened(mine.rename(copy), theirs)


def test_the_rounded_fingerprint_sees_weights_and_not_their_dtype(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = make_tiny_model()
    found, exact = rounded_fingerprint(model), model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.5
    assert rounded_fingerprint(model) != found
    again = make_tiny_model().to(torch.bfloat16)
    assert rounded_fingerprint(again) == found
    assert model_fingerprint(again) != exact
    assert rounded_fingerprint(model.to(torch.float16)) is None
