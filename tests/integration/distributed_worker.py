"""What each of two processes does in the tests of scale-out; started by torchrun.

Takes a folder with a model and writes into another: `rank0.safetensors`, `rank1.safetensors` and
what was said of errors. With one process, without a launcher, it gives the reference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import forgetless
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.calibration.calibrate import calibrate
from forgetless.calibration.engine import SiteMoments
from forgetless.data.loading import load_rows
from forgetless.data.spec import parse_data
from forgetless.errors import ForgetlessError
from forgetless.models.placement import is_sharded
from forgetless.models.targets import find_targets
from forgetless.processes import connect

CITIES = ("Ulm", "Bonn", "Kiel", "Jena", "Gera", "Celle", "Hof", "Trier", "Worms", "Aalen", "Bern")
KEEP = [
    f"Fact {n}: the city of {word} has {n * 37} bridges." for n, word in enumerate(CITIES)
]  # 11 rows: 6 batches of 2, the last one short
LEARN = [
    {"prompt": f"How many are {n} and {n + 3}?\n", "completion": f"They are {2 * n + 3}."}
    for n in range(9)
]
METHODS = ("lora", "lora-null", "sc-lora", "contrastive", "corda", "lora-ga")


class Work:
    def __init__(self, model: Path, out: Path) -> None:
        self.path, self.out = model, out
        self.processes = connect()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.tensors: dict[str, Tensor] = {}
        self.said: dict[str, str] = {}

    def model(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.path).eval()

    def keep(self, name: str, found: SiteMoments) -> None:
        for site, moment in found.moments.items():
            self.tensors[f"{name}/{site}"] = moment.mean_DD()
            self.tensors[f"{name}/{site}/mean"] = moment.mean_D()
            counts = [moment.num_tokens, moment.num_samples]
            self.tensors[f"{name}/{site}/counts"] = torch.tensor(counts)

    def moments(self) -> None:
        for name, rows, size in (("eleven", KEEP, 2), ("one batch", KEEP, 16)):
            model = self.model()
            sets = [load_rows(spec, self.tokenizer) for spec in parse_data(rows)]
            targets = find_targets(model).targets
            seen: list[tuple[int, int]] = []
            found = calibrate(
                model,
                self.tokenizer,
                targets,
                sets,
                batch_size=size,
                processes=self.processes,
                progress=lambda done, total, seen=seen: seen.append((done, total)),
            )
            self.keep(name, found)
            self.said[f"{name}: progress"] = json.dumps(seen[-1])

    def starts(self) -> None:
        for name, method, options in [
            *((method, method, {}) for method in METHODS),
            ("in passes", "sc-lora", {"memory_budget": 40_000}),
            ("kept", "sc-lora", {"cache": self.out / "cache"}),
            ("taken", "sc-lora", {"cache": self.out / "cache"}),
        ]:
            given = {"name": method, "rank": 4}
            model = forgetless.attach(
                self.model(),
                self.tokenizer,
                method=given,
                preserve_data=KEEP if method not in ("lora", "lora-ga") else None,
                train_data={"examples": LEARN}
                if method not in ("lora", "lora-null", "corda")
                else None,
                batch_size=2,
                **options,
            )
            self.keep_start(name, model)
            with torch.no_grad():  # a step of the same size everywhere, for a ΔW to compare
                for module in adapted_layers(model).values():
                    for weight in (
                        module.lora_A["default"].weight,
                        module.lora_B["default"].weight,
                    ):
                        if weight.requires_grad:
                            weight.add_(0.01)
            for layer, module in adapted_layers(model).items():
                a_RD, b_OR = factors(module)
                self.tensors[f"{name}/{layer}/delta"] = b_OR @ a_RD

    def keep_start(self, name: str, model: PeftModel) -> None:
        for layer, module in adapted_layers(model).items():
            for side in ("lora_A", "lora_B"):
                weight = getattr(module, side)["default"].weight
                self.tensors[f"{name}/{layer}/{side}"] = weight.detach().clone()

    def trainer(self) -> None:
        """On a trainer's own data, which every process has all of."""
        ids = [self.tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in LEARN]
        trainer = Trainer(
            model=self.model(),
            args=TrainingArguments(str(self.out / "trainer"), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            data_collator=DataCollatorForLanguageModeling(self.tokenizer, mlm=False),
            processing_class=self.tokenizer,
        )
        given = {"name": "sc-lora", "rank": 4}
        model = forgetless.initialize(trainer, method=given, preserve_data=KEEP, batch_size=2)
        self.keep_start("trainer", model)

    def mistakes(self) -> None:
        """Only one process meets the row whose activations are not finite: for each row in turn."""
        token = self.tokenizer("~", add_special_tokens=False)["input_ids"][0]
        for bad in range(len(KEEP)):
            model = self.model()
            with torch.no_grad():
                model.get_input_embeddings().weight[token] = torch.nan
            rows = [text + "~" * (row == bad) for row, text in enumerate(KEEP)]
            try:
                forgetless.attach(model, self.tokenizer, preserve_data=rows, rank=4, batch_size=2)
            except ForgetlessError as error:
                self.said[f"mistake {bad}"] = f"{type(error).__name__}: {error}"

    def sharded(self) -> None:
        """A loop of one's own: attach, shard with FSDP2 where there are several, train, export."""
        for trains in ("b", "both"):
            model = forgetless.attach(
                self.model(),
                self.tokenizer,
                method={"name": "lora-null", "rank": 4, "trains": trains},
                preserve_data=KEEP,
            )
            if self.processes.count > 1:
                for layer in model.get_base_model().model.layers:
                    fully_shard(layer)
                fully_shard(model)
                assert is_sharded(model)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimiser = torch.optim.AdamW(trained, lr=1e-2)
            for text in KEEP[:4]:  # the same rows everywhere: the mean of equal gradients is theirs
                ids_BT = self.tokenizer(text, return_tensors="pt")["input_ids"]
                loss = model(input_ids=ids_BT, labels=ids_BT).loss
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
            folder = forgetless.export(model, self.out / f"exported {trains}")
            if self.processes.count > 1:
                torch.distributed.barrier()  # the first one writes
            with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
                self.said[f"exported {trains}"] = json.dumps(file.metadata(), sort_keys=True)
            loaded = PeftModel.from_pretrained(self.model(), folder)
            for layer, module in adapted_layers(loaded).items():
                a_RD, b_OR = factors(module)
                self.tensors[f"sharded {trains}/{layer}/delta"] = b_OR @ a_RD

    def finish(self) -> None:
        rank = self.processes.rank
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, self.out / f"rank{rank}.safetensors")
        (self.out / f"rank{rank}.json").write_text(json.dumps(self.said))


def main() -> None:
    torch.set_num_threads(1)
    work = Work(Path(sys.argv[1]), Path(sys.argv[2]))
    for task in sys.argv[3:]:
        getattr(work, task)()
    work.finish()
    work.processes.part()


if __name__ == "__main__":
    main()
