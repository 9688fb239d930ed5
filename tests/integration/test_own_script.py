"""A user's own SFTTrainer script, with the one line of `attach` in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from forgetless.adapters.export import export
from forgetless.adapters.round_trip import check_round_trip
from forgetless.evaluation.likelihood import score_rows
from training_setup import ALL_FORMS, adapted, token_rows


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_an_adapter_that_trl_cast_on_one_side_trains_and_computes_in_the_users_own_script(
    make_tiny_model, tiny_tokenizer, tmp_path, form, bf16
):
    """TRL casts what trains of a quantised model to bfloat16, and leaves what is frozen."""
    base = make_tiny_model()
    base.is_loaded_in_4bit = True  # what TRL asks for
    model = adapted(base, form)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            learning_rate=1e-2,
            bf16=bf16,
            use_cpu=True,
            gradient_checkpointing=False,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"text": "The fox jumps over the dog."}] * 8),
        processing_class=tiny_tokenizer,
    )
    base.is_loaded_in_4bit = False  # counting parameters would ask bitsandbytes
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.bfloat16}, "TRL no longer casts: this test shows nothing"
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(model.get_parameter(n), p) for n, p in before.items())
    scores = score_rows(model, tiny_tokenizer, token_rows(4))
    assert np.isfinite(scores.nll_sum).all()
    export(model, tmp_path / "adapter")
    check_round_trip(model, tmp_path / "adapter", torch.arange(5, 29).reshape(2, 12))
