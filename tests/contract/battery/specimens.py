"""What the battery looks at: a variant attached to a tiny base of each kind of layer.

Each base has one block with square, wide (8 x 16, 16 x 24) and tall (24 x 16) layers. Kinds of
layer and ranks are paired, not multiplied: a layer's bias and the width of its adapter meet nowhere
in the code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from contract.battery.variants import Variant
from forgetless.adapters.attach import attach
from forgetless.adapters.forms import adapted_layers
from forgetless.errors import MethodError
from forgetless.methods.base import Method, Role
from forgetless.models.targets import find_targets
from tiny_bases import GROUPED, IDS

INPUT_IDS = torch.arange(5, 29).reshape(2, 12)
STEPS = 3
HALF = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA: dict[str, Any] = {**GROUPED, **HALF, "num_attention_heads": 2, "num_key_value_heads": 1}
GPT2 = {"n_positions": 128, "n_embd": 16, "n_inner": 24, "n_layer": 1, "n_head": 2}
KINDS = {
    "linear": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "biased": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "conv1d": GPT2Config(**IDS, **GPT2, initializer_range=0.2),
}
LAYERS = {
    "linear": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "conv1d": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}
LAYERS["biased"] = LAYERS["linear"]


@dataclass(frozen=True, slots=True)
class Case:
    """A base and a rank; "largest" is the smallest width of a layer, or what the method takes."""

    kind: str
    rank: int | Literal["largest"]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.kind}-{str(self.dtype).removeprefix('torch.')}-rank={self.rank}"


USUAL = Case("biased", 3)
CASES = [
    USUAL,
    Case("linear", 1),
    Case("linear", "largest"),
    Case("conv1d", 3),
    Case("conv1d", "largest"),
    Case("linear", 3, torch.bfloat16),
]


def make_base(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights each time; biases and norms are no constants; eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(KINDS[kind])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def smallest_width(model: nn.Module) -> int:
    """Of all layers that get an adapter."""
    targets = find_targets(model).targets.values()
    return min(min(target.in_features, target.out_features) for target in targets)


def takes(method: Method, model: nn.Module) -> bool:
    """Whether every layer is wide enough for a method's rank."""
    try:
        for target in find_targets(model).targets.values():
            method.check_layer(target.name, target.in_features, target.out_features)
    except MethodError:
        return False
    return True


def rank_in(variant: Variant, case: Case) -> int:
    """A case's rank as a number."""
    if case.rank != "largest":
        return case.rank
    base = make_base(case.kind)
    return next(r for r in range(smallest_width(base), 0, -1) if takes(variant.made(r), base))


def rows(role: Role, count: int = 16) -> dict[str, Any]:
    """Prompts and completions of unlike lengths: about 500 tokens, 20 times the widest layer."""
    records = [
        {
            "prompt": f"Question: {i} apples" + f" and {7 * i % 11} pears" * (i % 4) + "?",
            "completion": f" {2 * i} apples.",
        }
        if role == "train"
        else {
            "prompt": f"The capital of country {i}" + ", far from here," * (i % 3),
            "completion": f" is city {i * 7 % 13}, and it rains there.",
        }
        for i in range(count)
    ]
    return {"examples": records, "prompt": "{prompt}", "completion": "{completion}"}


def attached(
    base: nn.Module, tokenizer: PreTrainedTokenizerBase, method: Method, **more: Any
) -> PeftModel:
    """By the public way, with data of both roles."""
    data = {"train_data": rows("train"), "preserve_data": rows("preserve")}
    return attach(base, tokenizer, method=method, **{**data, **more})


def logits(model: nn.Module) -> Tensor:
    """Of a fixed input."""
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=INPUT_IDS).logits
    return found


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Copies, as `layer.lora_A`, `layer.lora_fixed_A` …"""
    return {
        f"{layer}.{name}": module[adapter].weight.detach().clone()
        for layer, lora in adapted_layers(model).items()
        for name, module in lora.named_children()
        if name.startswith(("lora_A", "lora_B", "lora_fixed")) and (adapter := "default") in module
    }


def short_name(parameter: str) -> str:
    """`base_model.model.x.lora_A.default.weight` as `adapter_tensors` calls it."""
    return parameter.removeprefix("base_model.model.").removesuffix(".default.weight")


class Specimen:
    """A variant on a base: as it starts, and after a few steps of training.

    Attributes:
        method: With its rank.
        model: Live; trained once `gradients` or `tuned` were asked for.
        base_logits: Before anything was attached.
        start: Adapter tensors before training.
        base_tensors: Those of the base.
        start_logits, disabled_logits: Before training, with the adapter on and off.
        trainable: Names of what trains, as in `start`.
    """

    def __init__(self, variant: Variant, case: Case, tokenizer: PreTrainedTokenizerBase) -> None:
        self.variant, self.case = variant, case
        base = make_base(case.kind, case.dtype)
        self.base_logits = logits(base)
        self.method = variant.made(rank_in(variant, case))
        self.model = attached(base, tokenizer, self.method)
        self.start = adapter_tensors(self.model)
        self.base_tensors = self._of_base()
        self.trainable = {short_name(n) for n, p in self.parameters().items() if p.requires_grad}
        self.start_logits = logits(self.model)
        with self.model.disable_adapter():
            self.disabled_logits = logits(self.model)

    def _of_base(self) -> dict[str, Tensor]:
        found = self.parameters().items()
        return {name: p.detach().clone() for name, p in found if ".lora_" not in name}

    def parameters(self) -> dict[str, nn.Parameter]:
        """By PEFT's names."""
        return dict(self.model.named_parameters())

    def base_is_untouched(self) -> bool:
        """Whether every weight of the base is bit for bit what it was."""
        return all(torch.equal(p, self.base_tensors[n]) for n, p in self._of_base().items())

    @functools.cached_property
    def gradients(self) -> list[set[str]]:
        """Names of the tensors with a nonzero gradient, step by step; trains the model."""
        trained = {n: p for n, p in self.parameters().items() if p.requires_grad}
        optimizer = torch.optim.Adam(trained.values(), lr=5e-3)
        found = []
        for _ in range(STEPS):
            self.model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
            found.append({short_name(n) for n, p in trained.items() if p.grad.any()})
            optimizer.step()
            optimizer.zero_grad()
        return found

    @functools.cached_property
    def tuned(self) -> Tensor:
        """Logits after training."""
        assert self.gradients
        return logits(self.model)
