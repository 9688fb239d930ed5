"""Write an adapter for llama.cpp: one GGUF file, loaded beside the GGUF of the base."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetless.adapters.card import CardFacts, write_card
from forgetless.adapters.export_target import ExportJob, ExportTarget
from forgetless.adapters.exported_files import GGUF_LORA
from forgetless.adapters.forms import adapted_layers
from forgetless.adapters.gguf.architectures import NAME
from forgetless.adapters.gguf.files import (
    GGUF,
    GgufLora,
    gguf_names,
    read_lora,
    updates_of,
    write_lora,
)
from forgetless.adapters.plain_files import save_plain
from forgetless.adapters.plain_lora import refuse_what_plain_lora_cannot_hold
from forgetless.adapters.public_names import base_label, is_local_base
from forgetless.adapters.round_trip import RoundTrip, check_round_trip
from forgetless.adapters.updates import base_name_of, padded, rank_of_updates, updates_to_write
from forgetless.adapters.whole_folder import written_into
from forgetless.models.targets import base_of

_LOADING = f"""\
from llama_cpp import Llama

llm = Llama("base.gguf", lora_path="this-folder/{GGUF}")
print(llm.create_chat_completion([{{"role": "user", "content": "Hello!"}}]))

# or, on the command line: llama-cli -m base.gguf --lora this-folder/{GGUF}
# base.gguf: the base model above, quantised or not, converted without --fuse-qkv"""


class LlamaCpp(ExportTarget):
    """One rank, alpha = rank, llama.cpp's names and order of rows; float32."""

    name = NAME
    is_peft = False

    def check(self, job: ExportJob) -> None:
        """The package `gguf`, the architecture, and a name for every layer."""
        gguf_names(base_of(job.model).config, adapted_layers(job.model, job.adapter))

    def write(self, job: ExportJob) -> torch.dtype:
        """The GGUF file, and a model card (`README.md`)."""
        self.check(job)
        refuse_what_plain_lora_cannot_hold(job.model, job.adapter)
        updates = updates_to_write(job)
        rank = rank_of_updates(updates)
        base = base_name_of(job)
        with written_into(job.folder, "export", GGUF_LORA) as workplace:
            write_lora(
                workplace / GGUF,
                padded(updates, rank),
                base_of(job.model).config,
                base=base_label(base) if base and not is_local_base(base) else None,
                revision=job.revision,
            )
            write_gguf_card(workplace, replace(job.card, base=base))
        return torch.float32

    def compare(self, job: ExportJob, input_ids_BT: Tensor) -> RoundTrip:
        """Read the file back, and load what it says beside the live adapter with PEFT."""
        path = job.folder / GGUF
        stored = updates_of(read_lora(path), base_of(job.model).config)
        with tempfile.TemporaryDirectory() as name:
            save_plain(Path(name), job, stored)
            return check_round_trip(
                job.model,
                Path(name),
                input_ids_BT,
                scale=job.scale,
                adapter=job.adapter,
                shown=path,
            )

    def summary(self, rank: int, dtype: torch.dtype) -> str:
        """The rank, and the name of the file."""
        return f"LoRA of rank {rank} as {GGUF} for {NAME}"


def write_gguf_card(folder: Path, facts: CardFacts) -> Path:
    """Write, or replace, the card of a folder with a GGUF file."""
    config = _card_config(read_lora(folder / GGUF))
    facts = replace(facts, library="gguf", tags=("gguf", "llama-cpp"), loading=_LOADING)
    return write_card(folder, facts, config=config)


def _card_config(lora: GgufLora) -> dict[str, Any]:
    """What a card says of an adapter, under PEFT's names."""
    return {
        "base_model_name_or_path": lora.metadata.get("general.base_model.0.name"),
        "revision": lora.metadata.get("general.base_model.0.version"),
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "target_modules": sorted({name.split(".")[-2] for name in lora.layers}),
    }
