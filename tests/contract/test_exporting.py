"""`forgetless export` from a folder: the right base, its own dtype, and errors that help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from forgetless.adapters import merge
from forgetless.adapters.export import EXPORT_TARGETS
from forgetless.adapters.export_target import ExportJob, ExportTarget
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.round_trip import RoundTrip
from forgetless.errors import AdapterError, ArtefactError, ForgetlessError
from forgetless.experiments.exporting import export_folder
from forgetless.models import hardware


@pytest.fixture(
    params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def saved(
    request: pytest.FixtureRequest, tiny_model: nn.Module, save_model: Callable[..., Path]
) -> tuple[Path, dict[str, torch.Tensor], torch.dtype]:
    """An adapter folder on a base in one of two dtypes, and its updates by layer."""
    base = save_model(tiny_model.to(request.param))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    folder = base.parent / "adapter"
    model.save_pretrained(str(folder))
    updates = {}
    for name, layer in adapted_layers(model).items():
        a_RD, b_OR = factors(layer)
        updates[name] = b_OR @ a_RD
    return folder, updates, request.param


@pytest.mark.parametrize("preferred", [torch.float32, torch.bfloat16])
def test_a_merge_keeps_the_dtype_of_the_checkpoint_and_rounds_once(
    saved: tuple[Path, dict[str, torch.Tensor], torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
    preferred: torch.dtype,
) -> None:
    folder, updates, dtype = saved
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda device: preferred == torch.bfloat16)
    done = export_folder(folder, folder.parent / "merged", target="merged", scale=0.5)
    assert done.dtype == dtype
    found = load_file(folder.parent / "merged" / "model.safetensors")
    base = load_file(folder.parent / "model" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        expected = base[name]
        update = updates.get(name.removesuffix(".weight"))
        if update is not None:
            expected = (expected.float() + 0.5 * update).to(dtype)
        assert torch.equal(tensor, expected), name
    reloaded = AutoModelForCausalLM.from_pretrained(folder.parent / "merged", dtype="auto")
    assert reloaded.dtype == dtype


def test_a_merge_that_went_wrong_is_an_error(
    saved: tuple[Path, dict[str, torch.Tensor], torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = saved
    honest = merge.save_merged

    def wrong(model: object, output: Path, *, scale: float, **others: object) -> Path:
        return honest(model, output, scale=scale * 9, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "save_merged", wrong)
    with pytest.raises(AdapterError, match=r"merge: .* expected W \+ ΔW rounded once"):
        export_folder(folder, folder.parent / "merged", target="merged")


def test_a_truncated_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LO')
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        export_folder(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_the_folder_of_a_stopped_run_names_its_checkpoints(tmp_path: Path, inside: str) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(ForgetlessError, match="checkpoints/checkpoint-40"):
        export_folder(tmp_path / "run" / inside, tmp_path / "out")


class Listing(ExportTarget):
    """One more target: names of layers and their ranks in a text file."""

    name = "listing"

    def write(self, job: ExportJob) -> torch.dtype:
        job.folder.mkdir(parents=True)
        ranks = {
            n: factors(x, job.adapter)[0].shape[0] for n, x in adapted_layers(job.model).items()
        }
        (job.folder / "list.txt").write_text(repr(ranks))
        return torch.float32

    def compare(self, job: ExportJob, input_ids_BT: torch.Tensor) -> RoundTrip:
        assert (job.folder / "list.txt").is_file()
        return RoundTrip(0.0, 1.0, 0.0)

    def summary(self, rank: int, dtype: torch.dtype) -> str:
        return f"list of rank {rank}"


@pytest.mark.filterwarnings("ignore:export. rank 4 is cut")
def test_a_further_target_is_one_more_object(
    saved: tuple[Path, dict[str, torch.Tensor], torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = saved
    monkeypatch.setitem(EXPORT_TARGETS, "listing", Listing())
    done = export_folder(folder, folder.parent / "out", target="listing", max_rank=3)
    assert done.summary == "list of rank 3"
    assert "q_proj': 3" in (folder.parent / "out" / "list.txt").read_text()


def test_a_merge_is_not_asked_for_on_a_base_to_be_quantised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "no/such-base"}')
    with pytest.raises(AdapterError, match="leave out --quantization"):
        export_folder(tmp_path, tmp_path / "out", target="merged", quantization="nf4")
    assert not (tmp_path / "out").exists()
