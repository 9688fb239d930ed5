"""Quantised bases for tests: which can be made here, and their weights by the formats' text."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetless.models.quantization import QUANTIZERS

NAMES = {
    "nf4": "bitsandbytes nf4",
    "int8": "bitsandbytes int8",
    "torchao-int8": "torchao int8",
}
GROUP = 32  # weights that share a scale, in GPTQ


def needed(name: str) -> Any:
    """Skips where the package of a quantisation is not installed."""
    package = QUANTIZERS[name].package
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: forgetless[quantized]")


def cells(names: Iterable[str] = tuple(QUANTIZERS), **more: str) -> list[Any]:
    return [
        pytest.param(
            name,
            id=name,
            marks=[
                needed(name),
                pytest.mark.compatibility(base="Llama", quantization=NAMES[name], **more),
            ],
        )
        for name in names
    ]


def independent_weight(quantization: str, weight_OD: Tensor) -> Tensor:
    """Quantised and dequantised by the text of the formats, in float64."""
    weight = weight_OD.double()
    if quantization == "int8":  # symmetric, a scale a row
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    if quantization == "torchao-int8":  # the same, over 255 / 2
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        return (weight / scale).round().clamp(-128, 127) * scale
    # NF4: QLoRA, arXiv:2305.14314, App. E: 16 levels, blocks of 64 in the order of memory.
    levels = torch.tensor(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        dtype=torch.float64,
    )  # fmt: skip
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / absmax)[..., None].sub(levels).abs().argmin(-1)
    return (levels[nearest] * absmax).reshape(weight.shape)


def gptq_layer(dense: nn.Linear) -> tuple[nn.Module, Tensor]:
    """GPT-QModel's layer in torch, and the weight (O, D) that its codes and scales stand for."""
    layers = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    O, D = dense.weight.shape  # noqa: E741
    grouped = dense.weight.detach().float().reshape(O, D // GROUP, GROUP)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round()
    codes = (grouped / scale[..., None]).round().add(zero[..., None]).clamp(0, 15)
    expected_OD = ((codes - zero[..., None]) * scale[..., None]).reshape(O, D)
    layer = layers.TorchLinear(
        bits=4,
        group_size=GROUP,
        sym=False,
        desc_act=False,
        in_features=D,
        out_features=O,
        bias=dense.bias is not None,
    )
    groups = torch.arange(D, dtype=torch.int32) // GROUP
    layer.pack_original(linear=dense, scales=scale, zeros=zero, g_idx=groups)
    layer.post_init()
    return layer.eval(), expected_OD


def gptq_base(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Replace all linear layers below the head; their expected weights by name."""
    expected = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            parent, _, last = name.rpartition(".")
            layer, expected[name] = gptq_layer(module)
            setattr(model.get_submodule(parent), last, layer)
    return model, expected
