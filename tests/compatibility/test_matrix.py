"""Every architecture × form × export target, and every trainer on a few architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

import forgetless
from compatibility.cells import refuse
from forgetless.adapters.export import EXPORT_TARGETS
from forgetless.adapters.export_target import ExportJob
from forgetless.errors import AdapterError
from tiny_bases import CONFIGS, ENCODER_DECODERS, tiny_base

TEXTS = [f"The capital of country {i} is city {i * 7 % 13}, and it rains there." for i in range(40)]
TRAIN = [f"Question: {i} apples and {i} apples? Answer: {2 * i} apples." for i in range(40)]
METHODS: dict[str, dict[str, str]] = {
    "plain": {"name": "lora"},
    "b": {"name": "lora-null"},
    "a": {"name": "sc-lora", "trains": "a"},
    "both": {"name": "sc-lora"},
}
IDS = torch.arange(5, 29).reshape(2, 12)
# What a target must write: a refusal of one of these is a failure. All others it must refuse.
LLAMA_CPP = {
    "llama", "qwen2", "qwen3", "mistral", "gemma3", "phi", "phi3", "gpt2", "gpt_neox",
}  # fmt: skip
MUST_WRITE: dict[str, set[str]] = {
    **{target: set(CONFIGS) for target in ("peft", "vllm", "sglang", "tgi", "merged")},
    "llama.cpp": LLAMA_CPP,
}

pytestmark = pytest.mark.filterwarnings("ignore::forgetless.errors.ForgetlessWarning")


def spec(base: str, texts: list[str]) -> object:
    """Texts; for an encoder-decoder split in two."""
    if base not in ENCODER_DECODERS:
        return texts
    rows = [{"prompt": t[: len(t) // 2], "completion": t[len(t) // 2 :]} for t in texts]
    return {"examples": rows, "prompt": "{prompt}", "completion": "{completion}"}


def attached(base: str, form: str, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    return forgetless.attach(
        tiny_base(base),
        tokenizer,
        method=METHODS[form],
        rank=4,
        preserve_data=spec(base, TEXTS),  # type: ignore[arg-type]
        train_data=spec(base, TRAIN),  # type: ignore[arg-type]
    )


@pytest.fixture(
    scope="module",
    params=[(base, form) for base in CONFIGS for form in METHODS],
    ids="-".join,
)
def trained(
    request: pytest.FixtureRequest, make_tiny_tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> tuple[str, PeftModel]:
    """The base's name; two steps of a hand-written loop."""
    base, form = request.param
    model = attached(base, form, make_tiny_tokenizer()).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, model.eval()


@pytest.mark.compatibility(base="{trained[0]}", form="{trained[1]}", export="{target}")
@pytest.mark.parametrize("target", EXPORT_TARGETS)
def test_what_is_trained_is_exported_and_reloaded_the_same(
    trained: tuple[str, PeftModel],
    target: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if target == "llama.cpp":
        pytest.importorskip("gguf", reason="pip install 'forgetless[llama-cpp]'")
    base, model = trained
    job = ExportJob(model=model, folder=tmp_path / "out", tokenizer=tiny_tokenizer)
    if base not in MUST_WRITE[target]:
        with pytest.raises(AdapterError) as caught:
            EXPORT_TARGETS[target].write(job)
        assert "\n" not in str(caught.value)
        assert not job.folder.exists()
        refuse(request, str(caught.value).rpartition("; ")[2])
        return
    EXPORT_TARGETS[target].write(job)
    # Raises where an update or the logits differ.
    check = EXPORT_TARGETS[target].compare(job, IDS)
    assert check.max_difference < 1e-3 * check.max_logit
