"""Write the base with the update added to its weights: a model that needs no adapter."""

# Shape letters in this file: D = layer input width, O = layer output width, R = rank.

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.card import write_card
from forgetless.adapters.export_target import ExportJob, ExportTarget
from forgetless.adapters.exported_files import WHOLE_MODEL
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.plain_lora import refuse_what_plain_lora_cannot_hold
from forgetless.adapters.round_trip import RoundTrip, check_merged
from forgetless.adapters.whole_folder import written_into
from forgetless.errors import AdapterError
from forgetless.linalg.precision import full_precision
from forgetless.models.dequantize import is_quantized
from forgetless.models.quantization import quantization_of
from forgetless.models.targets import base_of, module_suffixes


class MergedModel(ExportTarget):
    """W + ΔW in every adapted layer; any engine that serves the base serves this."""

    name = "merged"
    is_adapter = False
    is_peft = False

    def check(self, job: ExportJob) -> None:
        """Whether the base is in full precision."""
        _refuse_quantized(job.model, job.adapter)

    def write(self, job: ExportJob) -> torch.dtype:
        """The whole model with its card, and the tokenizer where the job has one."""
        save_merged(
            job.model,
            job.folder,
            scale=job.scale,
            adapter=job.adapter,
            dtype=job.checkpoint_dtype,
            tokenizer=job.tokenizer,
        )
        config = job.model.peft_config[job.adapter].to_dict()
        config["revision"] = job.revision or config["revision"]
        layers = adapted_layers(job.model, job.adapter)
        config["target_modules"] = module_suffixes(base_of(job.model), list(layers))
        name = job.base_name or base_of(job.model).config.name_or_path
        write_card(job.folder, replace(job.card, base=name or None), config=config, merged=True)
        return _dtype(job)

    def compare(self, job: ExportJob, input_ids_BT: Tensor) -> RoundTrip:
        """Load the model that was written."""
        # By the base's own class: an encoder-decoder is merged, too.
        kind = type(base_of(job.model))
        merged = kind.from_pretrained(job.folder, dtype=_dtype(job), local_files_only=True)
        merged = merged.to(input_ids_BT.device).eval()
        return check_merged(job.model, merged, input_ids_BT, scale=job.scale, adapter=job.adapter)

    def summary(self, rank: int, dtype: torch.dtype) -> str:
        """The rounding."""
        saved = str(dtype).removeprefix("torch.")
        return f"model with an update of rank {rank} added in float32, saved as {saved}"


def _dtype(job: ExportJob) -> torch.dtype:
    return job.checkpoint_dtype or base_of(job.model).dtype


def save_merged(
    model: PeftModel,
    folder: Path | str,
    *,
    scale: float = 1.0,
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write the base with W + scale·ΔW, rounded once; biases and all else kept.

    The live model is not changed.

    Args:
        model: A PeftModel with any of our forms, or any PEFT LoRA on linear layers.
        folder: Where to write.
        scale: Factor on ΔW.
        adapter: Which adapter.
        dtype: Of the weights written; the base's own by default.
        tokenizer: Written beside the model.

    Raises:
        AdapterError: A quantised base, an adapter that is more than plain LoRA, or a folder or
            configuration that cannot be written.
    """
    folder = Path(folder)
    refuse_what_plain_lora_cannot_hold(model, adapter)
    _refuse_quantized(model, adapter)
    base = base_of(model)
    # Of other adapters too: their factors, and modules that they train in full.
    state = {
        key.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for key, tensor in base.state_dict(keep_vars=False).items()
        if ".lora_" not in key and ".modules_to_save." not in key
    }
    for name, layer in adapted_layers(model, adapter).items():
        a_RD, b_OR = factors(layer, adapter)
        with full_precision():
            delta_OD = (b_OR @ a_RD) * scale
        if isinstance(layer.get_base_layer(), Conv1D):
            delta_OD = delta_OD.T
        weight = state[f"{name}.weight"]
        merged = weight.to(delta_OD.dtype) + delta_OD
        state[f"{name}.weight"] = merged.to(dtype or weight.dtype).contiguous()
    with written_into(folder, "merge", WHOLE_MODEL) as workplace:
        try:
            base.save_pretrained(str(workplace), state_dict=_cast(state, dtype))
        except ValueError as error:  # transformers checks what it copies, the base's settings too
            first = str(error).strip().splitlines()[0]
            raise AdapterError(
                f"merge: transformers refuses to save this base ({first}); mend its "
                "generation_config.json first"
            ) from error
        if dtype is not None:  # save_pretrained writes that of the live model
            config = copy.deepcopy(base.config)
            config.dtype = dtype
            config.save_pretrained(str(workplace))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(workplace))
    return folder


def _refuse_quantized(model: PeftModel, adapter: str) -> None:
    """PEFT would merge there, and quantise the sum anew: another model than the one trained."""
    for name, layer in adapted_layers(model, adapter).items():
        if is_quantized(layer.get_base_layer()):
            kind = quantization_of(base_of(model).config) or "by hand"
            raise AdapterError(
                f"merge: expected a full-precision base, got layer {name} quantised ({kind}); "
                "export the adapter, open it on the full-precision base, and merge there"
            )


def _cast(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Floating tensors in another dtype; tied ones stay one tensor."""
    if dtype is None:
        return state
    made: dict[tuple[int, torch.Size], Tensor] = {}
    found = dict(state)  # the originals stay alive, so that no address is used twice
    for name, tensor in state.items():
        if tensor.is_floating_point():
            found[name] = made.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))
    return found
