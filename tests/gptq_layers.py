"""A base whose linear layers are GPTQ's, rounded to the nearest code: no calibration, no files."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

GROUP = 32


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
