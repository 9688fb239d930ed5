"""Two processes, connected by gloo on this machine's CPU, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import KEEP, METHODS
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("distributed_worker.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MINUTES = 4


def start(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )


class Found:
    """What one process and what each of two has written."""

    def __init__(self, one: Path, two: Path) -> None:
        self.one = load_file(one / "rank0.safetensors")
        self.two = [load_file(two / f"rank{rank}.safetensors") for rank in (0, 1)]
        self.said_of_one = json.loads((one / "rank0.json").read_text())
        self.said = [json.loads((two / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    def pairs(self, prefix: str) -> list[tuple[str, Tensor, Tensor]]:
        """Name, tensor of one process and of two; both of them must have the very same."""
        names = [name for name in self.one if name.startswith(f"{prefix}/")]
        assert names
        assert names == [name for name in self.two[0] if name.startswith(f"{prefix}/")]
        for name in names:
            assert torch.equal(self.two[0][name], self.two[1][name]), name
        return [(name, self.one[name], self.two[0][name]) for name in names]


@pytest.fixture(scope="module")
def found(tmp_path_factory, make_tiny_model, make_tiny_tokenizer) -> Found:
    folder = tmp_path_factory.mktemp("distributed")
    model, one, two = folder / "model", folder / "one", folder / "two"
    make_tiny_model().save_pretrained(model)
    make_tiny_tokenizer().save_pretrained(model)
    tasks = ["moments", "starts", "mistakes", "sharded", "trainer"]
    for out, launch in ((one, [sys.executable]), (two, LAUNCH)):
        out.mkdir()
        done = start([*launch, str(WORKER), str(model), str(out), *tasks])
        assert done.returncode == 0, done.stderr[-3000:]
    return Found(one, two)


@pytest.mark.parametrize("rows", ["eleven", "one batch"])  # one batch: the second process has none
def test_two_processes_give_the_moments_of_one(found: Found, rows: str) -> None:
    for name, one, two in found.pairs(rows):
        if name.endswith("counts"):
            assert torch.equal(one, two)
        else:
            assert (two - one).norm() <= 1e-6 * one.norm(), name
    for said in found.said:
        assert said[f"{rows}: progress"] == json.dumps([len(KEEP), len(KEEP)])


@pytest.mark.parametrize("start", [*METHODS, "in passes", "kept", "taken", "trainer"])
def test_two_processes_start_the_adapter_of_one(found: Found, start: str) -> None:
    for name, one, two in found.pairs(start):
        if name.endswith("delta"):
            assert (two - one).norm() <= 1e-4 * one.norm(), name
        elif name.endswith("lora_A") and bool(one.any()):
            assert (projector(two) - projector(one)).norm() <= 1e-3, name
        else:  # zeros are zeros in both
            assert (two - one).norm() <= 1e-3 * one.norm(), name


def test_an_error_of_one_process_is_heard_by_both(found: Found) -> None:
    failed = set()
    for row in range(len(KEEP)):
        texts = [said[f"mistake {row}"] for said in found.said]
        [rank] = [rank for rank in (0, 1) if "ElsewhereError" not in texts[rank]]
        assert texts[rank] == found.said_of_one[f"mistake {row}"]
        assert f"row {row} of" in texts[rank]
        assert f"process {rank} of 2" in texts[1 - rank]
        failed.add(rank)
    assert failed == {0, 1}


@pytest.mark.parametrize("trains", ["b", "both"])
def test_a_loop_that_shards_with_fsdp2_exports_the_adapter_of_one_process(
    found: Found, trains: str
) -> None:
    for name, one, two in found.pairs(f"sharded {trains}"):
        assert bool(one.any()), name
        assert (two - one).norm() <= 1e-4 * one.norm(), name
    facts = found.said_of_one[f"exported {trains}"]
    assert "forgetless_base" in facts  # the same base, whole or in parts
    assert found.said[0][f"exported {trains}"] == facts


def projector(a_RD: Tensor) -> Tensor:
    """Onto the row space, in float64."""
    _, _, rows_RD = torch.linalg.svd(a_RD.double(), full_matrices=False)
    return rows_RD.T @ rows_RD
