"""A trained adapter, saved and exported: the same function, opened by us, by PEFT, by transformers.

Every variant on one kind of layer, and every form with a scale on all of them: what a folder holds
follows from the form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from contract.battery.specimens import (
    CASES,
    USUAL,
    Case,
    Specimen,
    attached,
    logits,
    make_base,
)
from contract.battery.variants import SCALED, VARIANTS, Variant
from forgetless.adapters.export import export, save_merged
from forgetless.adapters.forms import form_of
from forgetless.adapters.load import load_adapter

every_specimen = pytest.mark.parametrize(
    ("variant", "case"),
    [
        pytest.param(variant, case, id=f"{variant}-{case}")
        for variant in VARIANTS
        for case in (CASES if variant in SCALED else [USUAL])
    ],
)


@pytest.fixture
def specimen(
    specimen_of: Callable[[Variant, Case], Specimen], variant: Variant, case: Case
) -> Specimen:
    """Trained."""
    found = specimen_of(variant, case)
    assert not torch.equal(found.tuned, found.base_logits)
    return found


@pytest.fixture
def fresh(case: Case) -> torch.nn.Module:
    return make_base(case.kind, case.dtype)


@every_specimen
def test_a_saved_adapter_opens_on_a_fresh_base_as_it_was(
    specimen: Specimen, fresh: torch.nn.Module, tmp_path: Path
) -> None:
    specimen.model.save_pretrained(str(tmp_path))
    opened = load_adapter(fresh, tmp_path)
    assert form_of(opened).name in (specimen.method.form, "plain")  # PEFT saves nothing of freezing
    assert torch.equal(logits(opened), specimen.tuned)
    with opened.disable_adapter():
        assert torch.equal(logits(opened), specimen.base_logits)


@every_specimen
def test_a_resumed_adapter_goes_on_as_it_was(
    specimen: Specimen,
    fresh: torch.nn.Module,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """As a Trainer resumes: the same attach, then the checkpoint into the adapter that is there."""
    specimen.model.save_pretrained(str(tmp_path))
    again = attached(fresh, tiny_tokenizer, specimen.method)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert form_of(again).name == specimen.method.form
    assert torch.equal(logits(again), specimen.tuned)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in specimen.parameters().items() if p.requires_grad
    }


@every_specimen
def test_an_export_opens_with_peft_alone(
    specimen: Specimen, fresh: torch.nn.Module, tmp_path: Path
) -> None:
    export(specimen.model, tmp_path)
    ranks = {
        tensor.shape[0 if "lora_A" in name else 1]
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    assert ranks == {specimen.method.rank * (2 if specimen.method.form == "both" else 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        opened = PeftModel.from_pretrained(fresh, str(tmp_path))
    assert_close(logits(opened), specimen)
    with opened.disable_adapter():
        assert torch.equal(logits(opened), specimen.base_logits)
    assert torch.equal(logits(specimen.model), specimen.tuned)


@every_specimen
def test_a_merged_model_opens_with_transformers_alone(
    specimen: Specimen, fresh: torch.nn.Module, tmp_path: Path
) -> None:
    save_merged(specimen.model, tmp_path)
    opened = type(fresh).from_pretrained(tmp_path)
    assert opened.dtype == specimen.case.dtype
    assert_close(logits(opened), specimen)
    assert torch.equal(logits(specimen.model), specimen.tuned)


def assert_close(found: torch.Tensor, specimen: Specimen) -> None:
    """To the rounding of the base's dtype, far below what training changed."""
    tolerance = 3e-2 if specimen.case.dtype == torch.bfloat16 else 1e-5
    size = specimen.tuned.norm()
    assert (found - specimen.tuned).norm() <= tolerance * size
    assert (specimen.tuned - specimen.base_logits).norm() > 5 * tolerance * size
