"""Cut an adapter's rank, losing least on data that the user names.

The metric of the loss is the second moment of each layer's inputs on those data. What is kept is
what the adapter does *there*: name data like those that the adapter is used on. In the metric of
preserve data, a LoRA-Null adapter would lose what it learned first, since it does nothing there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.public_names import public_name
from forgetless.atomic import write_atomically
from forgetless.calibration.calibrate import calibrate, check_token_count
from forgetless.calibration.engine import SiteMoments
from forgetless.data.loading import load_rows
from forgetless.data.spec import DataInput, parse_data
from forgetless.errors import AdapterError
from forgetless.linalg.lowrank import truncate
from forgetless.linalg.moments import output_energy
from forgetless.models.state import left_as_found
from forgetless.models.targets import Target, base_of, find_targets, module_suffixes

COMPRESSED = "forgetless-compressed"
FIGURES = "compression.json"


@dataclass(frozen=True, slots=True)
class InputMetric:
    """What the loss is measured in.

    Attributes:
        label: Which data, in a reader's words.
        moments: Of the inputs of every adapted layer; None for the identity.
    """

    label: str
    moments: SiteMoments | None

    def at(self, layer: str) -> Tensor | None:
        """M of a layer."""
        return None if self.moments is None else self.moments.of(layer).mean_DD()


IDENTITY = InputMetric("identity: every input direction weighs the same", None)


def metric_on(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DataInput,
    *,
    adapter: str = "default",
    batch_size: int = 8,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InputMetric:
    """Second moments of the base on data, at the layers of an adapter.

    Args:
        model: Holds the adapter, which is switched off meanwhile.
        tokenizer: Its tokenizer.
        data: A data spec, path, hub id, Dataset, list of strings, or "self".
        adapter: Which adapter.
        batch_size: Rows in a forward pass.
        cache: Folder that keeps moments and `self` samples.
        progress: Called with the rows done, and all rows.

    Raises:
        DataError: The data cannot be read or rendered.
        CalibrationError: No moments can be collected from them.
    """
    specs = parse_data(data, where="moments_data")
    rows = [load_rows(spec, tokenizer, model=model, cache=cache) for spec in specs]
    targets = _targets(model, adapter)
    moments = calibrate(
        model, tokenizer, targets, rows, batch_size=batch_size, cache=cache, progress=progress
    )
    check_token_count(moments, "compression", required=False)  # M may be singular
    # The label is written beside the export, and uploaded with it.
    label = ", ".join(public_name(spec.label) for spec in specs)
    return InputMetric(f"{label}: {moments.num_tokens} tokens", moments)


@dataclass(frozen=True, slots=True)
class LayerCompression:
    """One layer, in the metric.

    Attributes:
        error: √(tr((ΔW - ΔW') M (ΔW - ΔW')ᵀ) / tr(ΔW M ΔWᵀ)); 0 where ΔW does nothing there.
        drift_before: tr(ΔW M ΔWᵀ) / tr(W M Wᵀ).
        drift: tr(ΔW' M ΔW'ᵀ) / tr(W M Wᵀ).
    """

    error: float
    drift_before: float
    drift: float


@dataclass(frozen=True, slots=True)
class Compression:
    """What cutting the rank did.

    Attributes:
        metric: Label of the metric.
        rank_before: Largest rank of a layer.
        rank: The same afterwards.
        error: Of all layers together: the square root of the summed loss over the summed energy.
        worst_layer: The layer of the largest error.
        worst_error: Its error.
        drift_before: Mean over layers.
        drift: Mean over layers, afterwards.
        layers: By name.
    """

    metric: str
    rank_before: int
    rank: int
    error: float
    worst_layer: str
    worst_error: float
    drift_before: float
    drift: float
    layers: dict[str, LayerCompression]

    def lines(self) -> list[str]:
        """The figures in words."""
        return [
            f"rank {self.rank_before} cut to {self.rank}, metric {self.metric}",
            f"relative error {self.error:.2e} overall, {self.worst_error:.2e} at the worst layer, "
            f"{self.worst_layer}",
            f"drift in that metric {self.drift_before:.2e} before, {self.drift:.2e} after",
        ]


def keep_figures(compression: Compression | None, folder: Path) -> None:
    """Write all figures beside what was exported; those of an earlier export there go."""
    path = folder / FIGURES
    if compression is None:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, json.dumps(dataclasses.asdict(compression), indent=1) + "\n")


@contextmanager
def compressed(
    model: PeftModel,
    max_rank: int,
    metric: InputMetric,
    *,
    adapter: str = "default",
    scale: float = 1.0,
) -> Iterator[Compression]:
    """Inside the block the model holds scale·ΔW of lower rank, as the adapter `COMPRESSED`.

    The model is left as it was found.

    Raises:
        AdapterError: Layers that are no linear layers below the head.
    """
    targets, layers = _targets(model, adapter), adapted_layers(model, adapter)
    updates: dict[str, tuple[Tensor, Tensor]] = {}
    found: dict[str, LayerCompression] = {}
    lost = energy = 0.0
    for name, target in targets.items():
        a_RD, b_OR = factors(layers[name], adapter)
        moment_DD = metric.at(name)
        cut = truncate(a_RD, b_OR * scale, max_rank, moment_DD)
        updates[name] = (cut.a_RD, cut.b_OR)
        found[name] = _figures(cut.energy, cut.lost, target, moment_DD)
        lost, energy = lost + cut.lost, energy + cut.energy
    worst = max(found, key=lambda name: found[name].error)
    rank = max(a_RD.shape[0] for a_RD, _ in updates.values())
    with left_as_found(model):
        _hold(model, updates, rank, adapter)
        try:
            yield Compression(
                metric=metric.label,
                rank_before=rank_of(model, adapter),
                rank=rank,
                error=_root_share(lost, energy),
                worst_layer=worst,
                worst_error=found[worst].error,
                drift_before=sum(x.drift_before for x in found.values()) / len(found),
                drift=sum(x.drift for x in found.values()) / len(found),
                layers=found,
            )
        finally:
            model.set_adapter(adapter)  # PEFT warns of deleting the active one
            model.delete_adapter(COMPRESSED)


def rank_of(model: PeftModel, adapter: str = "default") -> int:
    """The largest rank of an adapter's update in any layer; twice its own for the form `both`."""
    layers = adapted_layers(model, adapter).values()
    return max(factors(layer, adapter)[0].shape[0] for layer in layers)


def _targets(model: PeftModel, adapter: str) -> dict[str, Target]:
    """The adapted layers as calibration takes them."""
    layers = adapted_layers(model, adapter)
    # By name: an adapter of somebody else may hold layers that no one would pick by default.
    targets = {n: t for n, t in find_targets(model, list(layers)).targets.items() if n in layers}
    odd = sorted(layers.keys() - targets.keys())
    if odd:
        raise AdapterError(
            f"compression: expected linear layers below the head, got {odd[0]}; "
            "leave out --max-rank"
        )
    return targets


def _figures(
    energy: float, lost: float, target: Target, moment_DD: Tensor | None
) -> LayerCompression:
    weight_OD = target.weight_OD()
    if moment_DD is None:
        whole = float(weight_OD.square().sum())
    else:
        whole = float(output_energy(weight_OD.to(moment_DD), moment_DD))
    share = 1 / whole if whole > 0 else 0.0
    return LayerCompression(_root_share(lost, energy), energy * share, (energy - lost) * share)


def _root_share(lost: float, energy: float) -> float:
    return (lost / energy) ** 0.5 if energy > 0 else 0.0


def _hold(
    model: PeftModel, updates: dict[str, tuple[Tensor, Tensor]], rank: int, adapter: str
) -> None:
    """Put updates into a plain LoRA beside the live adapter, padded to one rank."""
    config = LoraConfig(
        task_type=model.peft_config[adapter].task_type,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=module_suffixes(base_of(model), list(updates)),
        init_lora_weights=True,
        fan_in_fan_out=all(
            isinstance(layer.get_base_layer(), Conv1D)
            for layer in adapted_layers(model, adapter).values()
        ),
    )
    model.add_adapter(COMPRESSED, config)
    with torch.no_grad():
        for name, layer in adapted_layers(model, COMPRESSED).items():
            a_RD, b_OR = updates[name]
            for held, part in ((layer.lora_A, a_RD), (layer.lora_B, b_OR)):
                weight = held[COMPRESSED].weight
                weight.zero_()
                weight[: part.shape[0], : part.shape[1]] = part.to(weight)
