"""Which of PEFT's layers hold which form: what is read off them is what they do when called."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import forgetless
from forgetless.adapters.variant import BothVariant
from forgetless.errors import AdapterError, ModelError
from forgetless.models.load import load_model
from forgetless.models.targets import find_targets
from quantized_bases import cells


class Coded(nn.Module):
    """A layer of no known library: codes, one scale, and no `weight`."""

    def __init__(self, dense: nn.Linear, curved: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.scale = float(dense.weight.abs().max()) / 127
        self.curved = curved
        self.register_buffer("codes", (dense.weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.codes.float() * self.scale).T + 0.5
        return y.relu() if self.curved else y


def test_a_quantised_layer_of_an_unknown_library_is_a_target_and_refused_where_peft_has_no_lora(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    mlp = tiny_model.model.layers[1].mlp
    mlp.up_proj = Coded(mlp.up_proj)
    target = find_targets(tiny_model).targets["model.layers.1.mlp.up_proj"]
    expected = mlp.up_proj.codes.float() * mlp.up_proj.scale
    torch.testing.assert_close(target.weight_OD(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AdapterError, match=r"PEFT has a LoRA for, got model.layers.1.mlp.up_proj"):
        forgetless.attach(tiny_model, tiny_tokenizer, method="lora", rank=4)
    mlp.up_proj = Coded(nn.Linear(32, 64), curved=True)
    with pytest.raises(ModelError, match="leave it out of targets"):
        find_targets(tiny_model).targets["model.layers.1.mlp.up_proj"].weight_OD()


class Recorder(LoraVariant):
    """Says that it was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Any:  # type: ignore[override]
        self.calls.append("forward")
        return result

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        self.calls.append("merge")
        return orig_weight

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        self.calls.append("merge")


def calls_of(layer: LoraLayer, width: int) -> set[str]:
    """What PEFT's layer calls of its variant, in a forward pass and in a merge."""
    recorder = Recorder()
    layer.lora_variant["default"] = recorder
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(1, 2, width))
        if type(layer).merge is not BaseTunerLayer.merge:
            layer.merge()
    return set(recorder.calls)


@pytest.mark.parametrize("quantization", [pytest.param("none", id="none"), *cells()])
def test_what_is_read_off_pefts_layers_is_what_they_do(
    quantization: str, tiny_model_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["up_proj"])
    model = get_peft_model(
        load_model(
            str(tiny_model_path), dtype="float32", device="cpu", quantization=quantization
        ).model,
        config,
    )
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    accepted = quantization != "torchao-int8"
    if accepted:
        BothVariant.refuse_layer(layer, "default")
    else:
        with pytest.raises(AdapterError, match="merges without calling the variant"):
            BothVariant.refuse_layer(layer, "default")
    assert calls_of(layer, 32) == ({"forward", "merge"} if accepted else {"forward"})


def test_layers_of_peft_that_never_look_at_variants_are_told_apart() -> None:
    """AWQ's layer needs no AWQ to be made; those of AQLM, EETQ and others are alike."""
    from peft.tuners.lora.awq import AwqLoraLinear

    layer = AwqLoraLinear(nn.Linear(8, 8), "default", config=LoraConfig(r=2), r=2, lora_alpha=2)
    with pytest.raises(AdapterError, match=r"never calls a variant.*trains: a or trains: b"):
        BothVariant.refuse_layer(layer, "default")
    assert calls_of(layer, 8) == set()


@pytest.mark.parametrize("module", ["aqlm", "eetq", "te", "tp_layer"])
def test_no_other_layer_of_peft_reads_its_variants(module: str) -> None:
    """In the text of PEFT's modules: their classes need libraries that are not here."""
    path = Path(importlib.util.find_spec(f"peft.tuners.lora.{module}").origin)  # type: ignore
    text = path.read_text(encoding="utf-8")
    forward = text[text.index("def forward") :]
    assert "lora_variant" not in forward


def test_gptqs_layer_calls_its_variant_in_forward_and_refuses_to_merge() -> None:
    from peft.tuners.lora.gptq import GPTQLoraLinear

    layer = GPTQLoraLinear(nn.Linear(8, 8), "default", config=LoraConfig(r=2), r=2, lora_alpha=2)
    BothVariant.refuse_layer(layer, "default")
    assert calls_of(layer, 8) == {"forward"}
    with pytest.raises(NotImplementedError):
        layer.merge()
