"""Load a base model and its tokenizer by hub id, by path, or as the bundled demo model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from forgetless.errors import ModelError
from forgetless.models.bitsandbytes_cpu import keep_trainable_layout
from forgetless.models.cache import cache_dir
from forgetless.models.demo_model import demo_model_path
from forgetless.models.fingerprint import model_fingerprint
from forgetless.models.hardware import describe_hardware, has_fast_bf16, pick_device, pick_dtype
from forgetless.models.quantization import EXTRA, quantization_config, quantization_of
from forgetless.models.quantized_layers import check_quantized_layers

__all__ = [
    "DEMO",
    "LoadedModel",
    "base_reference",
    "cache_dir",
    "describe_hardware",
    "has_fast_bf16",
    "load_model",
    "model_fingerprint",
    "pick_device",
    "pick_dtype",
]

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What from_pretrained raises where a folder, a hub id or a file in them is wrong.
LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, SafetensorError, HFValidationError)


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready to be calibrated on and adapted.

    Attributes:
        model: In eval mode, on `device`.
        tokenizer: The model's own, unchanged.
        name: As asked for: hub id, path or `demo`.
        revision: Commit on the hub where it is known, else the revision asked for.
        device: Where the model is.
        dtype: Of its floating-point parameters as loaded.
        quantization: How its linear layers are quantised, in words; None where they are not.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    quantization: str | None = None


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str = "none",
) -> LoadedModel:
    """Load a causal language model and its tokenizer; prints nothing.

    Args:
        name: A folder, a hub id, or `demo`. An existing path wins over a hub id.
        dtype: `auto` takes bfloat16 where the device multiplies it in hardware, else float32.
        device: `auto` takes one CUDA device, else MPS, else the CPU.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        quantization: How to quantise the linear layers below the head on the way; `none` leaves the
            checkpoint as it is, which may be quantised already.

    Raises:
        ModelError: The model cannot be found or loaded, is no causal language model, or lacks
            weights; or it cannot be quantised so, also where no layer of it was.
    """
    where = _device(device)
    precision = _dtype(dtype, where)
    source = str(demo_model_path()) if name == DEMO else _source(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    # Reading a folder takes a moment; a download deserves its progress bars.
    with _no_progress_bars() if Path(source).is_dir() else nullcontext():
        config = _config(name, source, options)
        tokenizer = _tokenizer(name, source, options)
        wanted = quantization_config(quantization, precision, config)
        if wanted is not None:
            options["quantization_config"] = wanted
        model = _weights(name, source, config, precision, where, options)
    keep_trainable_layout(model)
    check_quantized_layers(model, quantization)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        name=name,
        revision=_commit(source, revision),
        device=where,
        dtype=precision,
        quantization=quantization_of(model.config),
    )


def base_reference(name: str) -> str:
    """The name by which peft alone finds a base model, whatever the current folder.

    An absolute path for a folder and for `demo`, else the name as it is.
    """
    path = demo_model_path() if name == DEMO else Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return pick_device()
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device: expected auto, cpu, mps, cuda or cuda:N that this machine has, "
            f"got {str(device)!r} ({_first_line(error)}); use auto"
        ) from error
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return pick_dtype(device)
    if dtype not in DTYPES:
        raise ModelError(
            f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}; use auto if in doubt"
        )
    return DTYPES[dtype]


def _source(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"model: expected a base model, got the adapter in {name!r}; "
                "name its base model, and evaluate the adapter on it"
            )
        raise ModelError(
            f"model: expected config.json in folder {name!r}, found none; check the path"
        )
    if path.exists():
        raise ModelError(
            f"model: expected a folder or a hub id, got the file {name!r}; name its folder"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model: expected a folder, {name!r} does not exist; check the path")
    return name


def _config(name: str, source: str, options: dict[str, Any]) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        raise _unreachable(name, source, error) from error
    remote = "AutoModelForCausalLM" in (config.to_dict().get("auto_map") or {})
    classes = config.architectures or []
    if not remote and classes and not set(classes) & _causal_classes():
        raise ModelError(
            f"model: expected a causal language model, got {classes[0]} in {name!r}; "
            "use a decoder model such as Llama, Qwen, Gemma or GPT-2"
        )
    return config


def _commit(source: str, revision: str | None) -> str | None:
    """The hub commit that was loaded: the name of its snapshot folder in the hub's cache."""
    if Path(source).is_dir():
        return revision
    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision


def _causal_classes() -> set[str]:
    found: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found.update([value] if isinstance(value, str) else value)
    return found


def _unreachable(name: str, source: str, error: BaseException) -> ModelError:
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return ModelError(
            f"model: {name!r} brings its own Python code, which is not run unless asked for; "
            "read it, then set trust_remote_code=true"
        )
    if isinstance(error, ImportError):
        return ModelError(
            f"model: {name!r} needs a package that is missing ({_first_line(error)}); install it "
            f"(bitsandbytes and torchao: {EXTRA})"
        )
    if Path(source).is_dir():
        return ModelError(
            f"model: expected a readable model in {name!r}, got {_first_line(error)}; "
            "check its files"
        )
    return ModelError(
        f"model: expected a folder or a reachable hub id, got {name!r} ({_first_line(error)}); "
        "check the spelling and the network, or download it and give its path"
    )


def _tokenizer(name: str, source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"tokenizer: expected one beside the model {name!r}, got {_first_line(error)}; "
            "save the tokenizer into the same folder"
        ) from error


def _weights(
    name: str,
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
) -> PreTrainedModel:
    quantised = "quantization_config" in {**config.to_dict(), **options}
    # Quantised layers are made on their device and cannot all be moved to it afterwards.
    placement = {"device_map": {"": device}} if quantised else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **placement, **options
        )
    except LOADING_ERRORS as error:
        raise _unreachable(name, source, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model: expected all weights in {name!r}, {len(missing)} are missing, "
            f"first {missing[0]!r}; "
            "it is incomplete, or no causal language model"
        )
    return model if quantised else model.to(device)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
