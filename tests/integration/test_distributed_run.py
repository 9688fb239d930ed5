"""`forgetless run` under a launcher: two processes against one, sharded, killed, and refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from run_setup import recipe_of, write_data
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHARDING = str(HERE / "sharding_launcher.py")
FSDP = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
ZERO_3 = {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}
MINUTES = 4


class Folder:
    """A tiny model with data and a recipe; each run in a cache of its own."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path = path
        write_data(path / "data")
        recipe = recipe_of(model, path / "data", path / "out")
        text = yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True))
        (path / "recipe.yaml").write_text(text)

    def command(self, launch: list[str], output: str, *overrides: str) -> list[str]:
        out = f"output={self.path / output}"
        return [*launch, "run", str(self.path / "recipe.yaml"), out, *overrides]

    def environment(self, output: str, **more: str) -> dict[str, str]:
        cache = {"FORGETLESS_CACHE": str(self.path / f"cache of {output}"), "OMP_NUM_THREADS": "1"}
        return os.environ | cache | more

    def run(
        self, launch: list[str], output: str, *overrides: str, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(launch, output, *overrides),
            env=self.environment(output, **env),
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
        )

    def record(self, output: str) -> dict[str, object]:
        return json.loads((self.path / output / "record.json").read_text())

    def updates(self, output: str) -> dict[str, Tensor]:
        """ΔW by layer, of the adapter that a run has exported."""
        tensors = load_file(self.path / output / "adapter" / "adapter_model.safetensors")
        return {
            name.removesuffix(".lora_A.weight"): tensors[name.replace("lora_A", "lora_B")] @ a_RD
            for name, a_RD in tensors.items()
            if "lora_A" in name
        }


ONE = [sys.executable, "-m", "forgetless"]
TWO = [*TORCHRUN, "-m", "forgetless"]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny_model: Callable[..., torch.nn.Module],
    make_tiny_tokenizer: Callable[[], object],
) -> Folder:
    path = tmp_path_factory.mktemp("runs")
    make_tiny_model().save_pretrained(path / "model")
    make_tiny_tokenizer().save_pretrained(path / "model")
    made = Folder(path, path / "model")
    done = made.run(ONE, "one")
    assert done.returncode == 0, done.stderr
    return made


def assert_same(folder: Folder, output: str, other: str = "one", tolerance: float = 1e-4) -> None:
    one, two = folder.updates(other), folder.updates(output)
    assert one.keys() == two.keys()
    for name, update in one.items():
        assert (two[name] - update).norm() <= tolerance * update.norm(), name


def test_two_processes_do_the_run_of_one(folder: Folder) -> None:
    done = folder.run(TWO, "two")
    assert done.returncode == 0, done.stderr
    assert_same(folder, "two")
    one, two = folder.record("one"), folder.record("two")
    for key in ("steps", "epochs", "tokens", "resumed_from"):
        assert two["training"][key] == one["training"][key]
    for point, other in zip(one["training"]["curve"], two["training"]["curve"], strict=True):
        assert other["loss"] == pytest.approx(point["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(point["grad_norm"], rel=1e-4)
    # One of them talks, and writes.
    assert done.stdout.count("Report:") == 1
    assert done.stderr.count("  evaluate ") == 1
    assert names(folder.path / "two") == names(folder.path / "one")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (
            "both",
            [
                "training.batch_size=8",  # of 36 rows: the second process has none of the last four
                "training.gradient_accumulation=2",
                "method={name: sc-lora, rank: 4, trains: both}",
            ],
        ),
        ("kl", ["training.regularisers=[{name: kl}]"]),
        ("full", ["method={name: full}"]),
    ],
)
def test_two_processes_do_what_one_does(folder: Folder, name: str, overrides: list[str]) -> None:
    single, double = f"single-{name}", f"double-{name}"
    for launch, output in ((ONE, single), (TWO, double)):
        done = folder.run(launch, output, *overrides, "training.max_steps=6")
        assert done.returncode == 0, done.stderr
    one, two = folder.record(single), folder.record(double)
    for point, other in zip(one["training"]["curve"], two["training"]["curve"], strict=True):
        assert other["loss"] == pytest.approx(point["loss"], abs=1e-4)
    assert two["training"]["tokens"] == one["training"]["tokens"]
    if name != "full":
        assert_same(folder, double, single)


def test_fsdp2_does_the_run_of_one_process(folder: Folder) -> None:
    done = folder.run([*TORCHRUN, SHARDING], "fsdp", **FSDP)
    assert done.returncode == 0, done.stderr
    assert_same(folder, "fsdp")
    # Not DDP under another name: the checkpoint is in parts, but for what trains.
    checkpoint = folder.path / "fsdp" / "checkpoints" / "checkpoint-30"
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir()
    assert (checkpoint / "adapter_model.safetensors").is_file()


def test_fsdp2_trains_with_the_regularisers_that_one_process_has(folder: Folder) -> None:
    terms = "training.regularisers=[{name: kl}, {name: drift}, {name: replay}]"
    # With those replayed, 40 rows: the second process has none of the last eight.
    changes = [terms, "training.batch_size=16", "training.max_steps=6"]
    single = folder.run(ONE, "terms", *changes)
    done = folder.run([*TORCHRUN, SHARDING], "fsdp-terms", *changes, **FSDP)
    assert (single.returncode, done.returncode) == (0, 0), single.stderr + done.stderr
    assert_same(folder, "fsdp-terms", "terms")


def test_a_checkpoint_goes_on_under_the_sharding_that_it_was_made_with(folder: Folder) -> None:
    done = folder.run([*TORCHRUN, SHARDING], "changed", "training.max_steps=6", **FSDP)
    assert done.returncode == 0, done.stderr
    checkpoints = folder.path / "changed" / "checkpoints"
    for name in ("checkpoint-6", "../record.json"):  # as where it had been stopped after step 3
        path = checkpoints / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = folder.run(ONE, "changed", "training.max_steps=6")
    assert done.returncode == 2
    assert "optimiser of a model that nothing shards, got one that FSDP has sharded" in done.stderr


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("full", ["method={name: full}"], "expected a model in one piece for method full"),
        (
            "project",
            ["method={name: lora, rank: 4}", "training.regularisers=[{name: project}]"],
            "regulariser project: expected a model in one piece",
        ),
    ],
)
def test_what_needs_the_whole_model_is_refused_where_it_is_sharded(
    folder: Folder, name: str, overrides: list[str], said: str
) -> None:
    done = folder.run([*TORCHRUN, SHARDING], f"refused-{name}", *overrides, **FSDP)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed, which builds its C++ parts with a compiler, is in no extra",
)
def test_zero_3_does_the_run_of_one_process(folder: Folder) -> None:
    done = folder.run([*TORCHRUN, SHARDING], "zero", **ZERO_3)
    assert done.returncode == 0, done.stderr
    assert_same(folder, "zero")


@pytest.mark.parametrize(
    ("launch", "env", "victim"),
    [(TWO, {}, 1), ([*TORCHRUN, SHARDING], FSDP, 0)],
    ids=["ddp", "fsdp"],
)
def test_a_process_that_dies_ends_the_run_and_the_same_command_resumes(
    folder: Folder, launch: list[str], env: dict[str, str], victim: int, tmp_path: Path
) -> None:
    # A short last batch: five steps an epoch, so that the run goes on within its second.
    changes = ["training.batch_size=8", "training.save_steps=9"]
    if not (folder.path / "one-short").exists():
        assert folder.run(ONE, "one-short", *changes).returncode == 0
    output = f"killed-{victim}"
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            folder.command(launch, output, *changes),
            env=folder.environment(output, **env),
            stdout=file,
            stderr=file,
        )
        try:
            marker = folder.path / output / "checkpoints" / "checkpoint-9" / "forgetless.json"
            wait_for(marker.exists, process)
            for child in psutil.Process(process.pid).children(recursive=True):
                if child.environ().get("RANK") == str(victim):
                    child.kill()
            assert process.wait(60) != 0
        finally:
            process.kill()
    text = log.read_text()
    assert "another of the 2 processes has ended" in text or "stopped by the launcher" in text
    assert "Exception ignored" not in text  # the signal comes while it is leaving, too
    assert "SIGKILL" in text  # the launcher's own report names who died
    left = [path for path in (folder.path / output).rglob("*") if path.suffix in (".tmp", ".part")]
    assert not left
    assert not (folder.path / output / "record.json").exists()
    done = folder.run(launch, output, *changes, **env)
    assert done.returncode == 0, done.stderr
    assert folder.record(output)["training"]["resumed_from"] == [9]
    assert_same(folder, output, "one-short")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["training.batch_size=3"], "expected a multiple of 2, the number of processes"),
        (["training.bach_size=4"], "unknown key `bach_size`"),
        (["train_data.0.path=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_told_once(folder: Folder, arguments: list[str], said: str) -> None:
    done = folder.run(TWO, "mistake", *arguments)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("forgetless: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "src/forgetless" not in done.stderr  # no traceback but the launcher's own
    assert not (folder.path / "mistake").exists()


def test_a_verb_that_several_processes_would_do_several_times_is_refused(folder: Folder) -> None:
    done = subprocess.run(
        [*TWO, "evaluate", str(folder.path / "recipe.yaml")],
        env=folder.environment("evaluate"),
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    assert done.stderr.count("forgetless: evaluate: expected one process, got 2") == 1


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Look every few milliseconds, while the process lives."""
    for _ in range(60 * MINUTES * 50):
        if happened():
            return
        assert process.poll() is None
        time.sleep(0.02)
    raise AssertionError("it took too long")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
