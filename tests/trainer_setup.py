"""The trainers that people use, on eight rows of a tiny task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

PAIRS = [(f"How many are {i} apples and {i}?", f" There are {2 * i} apples.") for i in range(8)]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 3,
}


def sft(model: nn.Module, tokenizer: Any, folder: Path, **options: Any) -> SFTTrainer:
    lora, eval_rows = options.pop("peft_config", None), options.pop("eval_dataset", None)
    callbacks = options.pop("callbacks", None)
    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c in PAIRS])
    settings = {**COMMON, "gradient_checkpointing": False, "max_length": 64, **options}
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=rows,
        eval_dataset=eval_rows and rows.select(range(2)),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=callbacks,
    )


def dpo(model: nn.Module, tokenizer: Any, folder: Path, **options: Any) -> DPOTrainer:
    lora = options.pop("peft_config", None)
    rows = [{"prompt": p, "chosen": c, "rejected": " I do not know."} for p, c in PAIRS]
    settings = {**COMMON, "gradient_checkpointing": False, "max_length": 64, **options}
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )


def plain(model: nn.Module, tokenizer: Any, folder: Path, **options: Any) -> Trainer:
    lora = options.pop("peft_config", None)
    rows = Dataset.from_list([dict(tokenizer(p + c)) for p, c in PAIRS])
    return Trainer(
        model=model if lora is None else get_peft_model(model, lora),
        args=TrainingArguments(output_dir=str(folder), **{**COMMON, **options}),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def seq2seq(model: nn.Module, tokenizer: Any, folder: Path, **options: Any) -> Seq2SeqTrainer:
    lora = options.pop("peft_config", None)
    rows = [{**tokenizer(p), "labels": tokenizer(c)["input_ids"]} for p, c in PAIRS]
    model = model if lora is None else get_peft_model(model, lora)
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(folder), **{**COMMON, **options}),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )


def loop(model: PeftModel, tokenizer: Any, folder: Path) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for prompt, completion in PAIRS[:4]:
        ids = tokenizer(prompt + completion, return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


Make = Callable[..., Trainer]
TRAINERS: dict[str, Make] = {"sft": sft, "dpo": dpo, "plain": plain}
