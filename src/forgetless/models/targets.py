"""Which layers of a base model get an adapter, and which are skipped and why."""

# Shape letters: O = layer output width, D = layer input width.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forgetless.errors import AdapterError
from forgetless.models.dequantize import dense_weight, is_quantized
from forgetless.models.pair import TunedPair
from forgetless.models.placement import values_of, with_weights

HEAD, EMBEDDING = "output head", "embedding"
USUAL_REASONS = (HEAD, EMBEDDING)  # layers that nobody expects to get an adapter
EXPERT_NAME = (
    "PEFT takes this name for the fused experts', so that no adapter could be loaded on it"
)
ONE_OUTPUT = "a gate with a single output, too narrow for an adapter"


@dataclass(frozen=True, slots=True)
class Target:
    """One layer of the base that gets an adapter.

    Attributes:
        name: Path in the base model, as `model.named_modules()` of the untouched base gives it.
        module: The base layer itself: nn.Linear, Conv1D, or a quantised layer of any library.
        in_features: D.
        out_features: O.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int

    def weight_OD(self) -> Tensor:
        """The weight, (O, D), dequantised, float32 or wider; not to be written to."""
        with with_weights(self.module):
            weight = dense_weight(self.name, self.module)
        if isinstance(self.module, Conv1D):
            weight = weight.T
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def bias_O(self) -> Tensor | None:
        """The bias, float32 or wider; None where the layer has none."""
        bias = getattr(self.module, "bias", None)  # quantised layers may have no such attribute
        if not isinstance(bias, Tensor):
            return None
        bias = values_of(self.module, "bias", bias)
        return bias.detach().to(torch.promote_types(bias.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class TargetSelection:
    """Layers that get an adapter, by name, and layers with weights that do not, with the reason."""

    targets: dict[str, Target]
    skipped: dict[str, str]

    def unexpected_skips(self) -> dict[str, str]:
        """Skipped layers besides the head and the embeddings."""
        return {n: why for n, why in self.skipped.items() if why not in USUAL_REASONS}


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model or a tuned pair, or the model itself.

    Raises:
        AdapterError: Neither of the two.
    """
    base = model.get_base_model() if isinstance(model, PeftModel | TunedPair) else model
    if not isinstance(base, PreTrainedModel):
        raise AdapterError(
            f"model: expected a transformers model or a PeftModel, got {type(model).__name__}"
        )
    return base


def find_targets(model: nn.Module, patterns: Sequence[str] | None = None) -> TargetSelection:
    """Every linear layer but the output head, or those that `patterns` name.

    Args:
        model: A transformers model or a PeftModel around one; only base layers are looked at.
        patterns: Module names or their last parts (`q_proj`, `mlp.down_proj`), as in PEFT's
            `target_modules`.

    Raises:
        AdapterError: A pattern that matches no linear layer, or that names the output head or a
            layer whose adapter PEFT could not load again.
    """
    if isinstance(patterns, str) or (patterns is not None and not patterns):
        raise AdapterError(
            f"targets: expected a list of module names, got {patterns!r}; write it as "
            "['q_proj', 'v_proj'], or leave it out for every linear layer but the head"
        )
    base = base_of(model)
    head = base.get_output_embeddings()
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    unmatched = set(patterns or ())
    expert_names = _expert_names(base)
    for raw_name, module in base.named_modules():
        name = raw_name.removesuffix(".base_layer")
        if _inside_adapter(raw_name) or isinstance(module, BaseTunerLayer):
            continue
        matched = [p for p in patterns or () if name == p or name.endswith(f".{p}")]
        widths = _widths(module)
        if module is head:
            if matched:
                raise AdapterError(
                    f"targets: {matched[0]!r} names the output head {name}; leave it out: TRL's "
                    "loss and most servers ignore an adapter there"
                )
            skipped[name] = HEAD
        elif widths is None:
            reason = _reason(module)
            if reason is not None:
                skipped[name or type(module).__name__] = reason
        elif name.rpartition(".")[2] in expert_names:
            if matched:
                raise AdapterError(
                    f"targets: {matched[0]!r} names {name}, but {EXPERT_NAME}; leave it out"
                )
            skipped[name] = EXPERT_NAME
        elif patterns is None and widths[1] == 1:
            skipped[name] = ONE_OUTPUT
        elif patterns is None or matched:
            targets[name] = Target(name, module, *widths)
            unmatched.difference_update(matched)
    if unmatched:
        raise AdapterError(
            f"targets: {sorted(unmatched)[0]!r} matches no linear layer; name modules by their "
            f"last part, such as {sorted({n.rpartition('.')[2] for n in _linear_names(base)})}"
        )
    if not targets:
        raise AdapterError("targets: the model has no linear layer besides its output head")
    return TargetSelection(targets, skipped)


def _expert_names(base: PreTrainedModel) -> set[str]:
    """Last parts of linear layers' names that PEFT reads as parts of fused experts.

    An adapter from before transformers fused experts names `gate_proj` and means each expert's.
    PEFT goes on to read it so in every configuration, also where the name is that of a dense or
    shared layer of the same model.
    """
    taken = set()
    for name in {n.rpartition(".")[2] for n in _linear_names(base)}:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, base, None)
        except ValueError:  # one of two parts that are fused into one, on its own
            taken.add(name)
            continue
        if name not in (config.target_modules or ()):
            taken.add(name)
    return taken


def _inside_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that can be a target."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    # GPTQ, HQQ, AWQ and others derive from nn.Module: known by widths and a weight in codes.
    found = [getattr(module, name, None) for name in ("in_features", "out_features")]
    widths = [width for width in found if isinstance(width, int)]
    if len(widths) == 2 and is_quantized(module):
        return widths[0], widths[1]
    return None


def _linear_names(base: nn.Module) -> list[str]:
    return [n for n, m in base.named_modules() if _widths(m) is not None and not _inside_adapter(n)]


def _reason(module: nn.Module) -> str | None:
    """Why a module with weight matrices of its own is no target; None where it has none."""
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    if any(p.ndim == 3 for p in own):
        return f"{type(module).__name__}: fused 3-D weights, not nn.Linear (mixture of experts?)"
    return f"{type(module).__name__}: not nn.Linear or Conv1D" if own else None


def module_suffixes(base: nn.Module, names: Sequence[str]) -> list[str]:
    """Shortest list of names for PEFT's `target_modules` that selects exactly `names`.

    Servers read the last part of module names; full paths are used only where a last part would
    select more.
    """
    wanted = set(names)
    by_suffix: dict[str, set[str]] = {}
    for raw_name, _ in base.named_modules():
        if raw_name and not _inside_adapter(raw_name):
            name = raw_name.removesuffix(".base_layer")
            by_suffix.setdefault(name.rpartition(".")[2], set()).add(name)
    suffixes = {name.rpartition(".")[2] for name in wanted}
    if all(by_suffix[suffix] <= wanted for suffix in suffixes):
        return sorted(suffixes)
    return sorted(wanted)
