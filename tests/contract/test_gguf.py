"""An adapter as GGUF: names, shapes, metadata and order of rows, as in llama.cpp's own files."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

import forgetless
from forgetless.adapters.export import EXPORT_TARGETS
from forgetless.adapters.export_target import ExportJob
from forgetless.adapters.forms import adapted_layers, factors
from forgetless.adapters.gguf import architectures
from forgetless.adapters.gguf.architectures import ARCHITECTURES
from forgetless.adapters.gguf.files import GGUF, GgufLora, read_lora, write_lora
from forgetless.adapters.lint import lint_adapter
from forgetless.cli import main
from forgetless.errors import AdapterError, ArtefactError
from tiny_bases import tiny_base

gguf = pytest.importorskip("gguf", reason="pip install 'forgetless[llama-cpp]'")
IDS = torch.arange(5, 29).reshape(2, 12)
BASES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi", "phi3", "gpt2", "gpt_neox")
TARGET = EXPORT_TARGETS["llama.cpp"]


def foreign(base: nn.Module, **options: Any) -> PeftModel:
    """Somebody's LoRA on every linear layer, B away from 0."""
    made = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **made)).eval()  # type: ignore[arg-type]


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {entry.name: np.array(entry.data) for entry in gguf.GGUFReader(path).tensors}


def metadata_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def updates(model: PeftModel) -> dict[str, np.ndarray]:
    found = {}
    for name, layer in adapted_layers(model).items():
        a_RD, b_OR = factors(layer)
        found[name] = (b_OR @ a_RD).numpy()
    return found


def test_metadata_and_shapes_are_those_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    model = foreign(tiny_base("llama"))
    forgetless.export(
        model, tmp_path, target="llama.cpp", base_name="somebody/tiny-llama", revision="abc"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", GGUF]
    found = metadata_of(tmp_path / GGUF)
    assert found["general.type"] == "adapter"
    assert found["general.architecture"] == "llama"
    assert found["adapter.type"] == "lora"
    assert found["adapter.lora.alpha"] == 4.0
    assert found["general.base_model.0.name"] == "somebody/tiny-llama"
    assert found["general.base_model.0.version"] == "abc"
    tensors = tensors_of(tmp_path / GGUF)
    layers = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert set(tensors) == {
        f"blk.{i}.{layer}.weight.lora_{x}" for i in (0, 1) for layer in layers for x in "ab"
    }
    assert all(t.dtype == np.float32 for t in tensors.values())
    # Scale alpha / rank of llama.cpp is 1 at every tensor.
    assert {t.shape[0] for n, t in tensors.items() if n.endswith("a")} == {4}
    assert tensors["blk.1.attn_k.weight.lora_a"].shape == (4, 32)
    assert tensors["blk.1.attn_k.weight.lora_b"].shape == (16, 4)
    assert tensors["blk.1.ffn_down.weight.lora_a"].shape == (4, 64)


def test_values_carry_every_scale_and_ranks_are_made_one(tmp_path: Path) -> None:
    """llama.cpp ignores rsLoRA and patterns; Qwen2's rows keep their order."""
    model = foreign(tiny_base("qwen2"), use_rslora=True, rank_pattern={"down_proj": 2})
    forgetless.export(model, tmp_path, target="llama.cpp", scale=0.5)
    tensors = tensors_of(tmp_path / GGUF)
    assert {t.shape[0] for n, t in tensors.items() if n.endswith("a")} == {4}
    for layer, theirs in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        written = tensors[f"blk.1.{layer}.weight.lora_b"] @ tensors[f"blk.1.{layer}.weight.lora_a"]
        peft = model.get_submodule(f"base_model.model.model.layers.1.{theirs}")
        expected = 0.5 * peft.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(written, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_what_is_read_back_is_the_live_adapter(name: str, tmp_path: Path) -> None:
    model = foreign(tiny_base(name))
    forgetless.export(model, tmp_path, target="llama.cpp")
    check = TARGET.compare(ExportJob(model=model, folder=tmp_path), IDS)
    assert check.max_update_error < 1e-6
    assert check.max_difference < 1e-5
    assert lint_adapter(tmp_path, "llama.cpp", model) == []


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_rows_in_the_wrong_order_do_not_pass_the_comparison(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(name)
    kind, model = base.config.model_type, foreign(base)
    with monkeypatch.context() as patch:
        unordered = dataclasses.replace(ARCHITECTURES[kind], row_orders={})
        patch.setitem(architectures.ARCHITECTURES, kind, unordered)
        forgetless.export(model, tmp_path, target="llama.cpp")
    with pytest.raises(AdapterError, match="expected the live adapter's update at layer"):
        TARGET.compare(ExportJob(model=model, folder=tmp_path), IDS)


@pytest.mark.parametrize("form", ["b", "both"])
@pytest.mark.filterwarnings("ignore::forgetless.errors.ForgetlessWarning")
def test_our_own_forms_are_written_exactly(
    form: str, tiny_model: PreTrainedModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [f"The capital of country {i} is city {i * 7 % 13}." for i in range(40)]
    method = {"name": "lora-null", "trains": form}
    model = forgetless.attach(tiny_model, tiny_tokenizer, method=method, rank=4, preserve_data=rows)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    forgetless.export(model, tmp_path, target="llama.cpp")
    check = TARGET.compare(ExportJob(model=model, folder=tmp_path), IDS)
    assert check.max_update_error < 1e-6
    assert read_lora(tmp_path / GGUF).rank == (8 if form == "both" else 4)


# --- the published GGUF of SmolLM2: made by llama.cpp's converter, read by transformers


@pytest.mark.demo_model
@pytest.mark.slow
def test_row_orders_are_those_of_a_published_gguf(demo_model_folder: Path, tmp_path: Path) -> None:
    """The adapter ΔW = W, of full rank: its B A must be what the published file holds as W.

    transformers un-permuted W when it loaded that file, by its own code.
    """
    from forgetless.models.demo_model import demo_model_gguf

    base = forgetless.load_model("demo", dtype="float32", device="cpu").model
    names = [f"model.layers.3.self_attn.{x}_proj" for x in "qkvo"]
    names += [f"model.layers.3.mlp.{x}_proj" for x in ("gate", "up")]
    written = {}
    for name in names:
        weight_OD = base.get_submodule(name).weight.detach()
        written[name] = (torch.eye(weight_OD.shape[1]), weight_OD)
    write_lora(tmp_path / GGUF, written, base.config)
    found = tensors_of(tmp_path / GGUF)
    published = {
        entry.name: gguf.dequantize(entry.data, entry.tensor_type)
        for entry in gguf.GGUFReader(demo_model_gguf()).tensors
        if entry.name.startswith("blk.3.")
    }
    assert len(found) == 2 * len(names)
    for name in found:
        if name.endswith("lora_b"):
            base_name = name.removesuffix(".lora_b")
            np.testing.assert_array_equal(found[name], published[base_name])
    moved = found["blk.3.attn_q.weight.lora_b"] != written[names[0]][1].numpy()
    assert moved.any(), "the order of rows changed nothing: this test shows nothing"


# --- what cannot be written, and what is no such file


def test_an_architecture_that_was_not_verified_is_refused_with_the_remedy(tmp_path: Path) -> None:
    base = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))
    model = foreign(base)
    with pytest.raises(AdapterError, match="got bloom, whose layers") as caught:
        forgetless.export(model, tmp_path / "out", target="llama.cpp")
    assert "--target merged" in str(caught.value)
    assert "--target peft" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    base = tiny_base("llama")
    base.model.layers[1].extra = nn.Linear(32, 32)
    model = foreign(base, target_modules=["q_proj", "extra"])
    with pytest.raises(AdapterError, match=r"got model\.layers\.1\.extra; leave it out"):
        forgetless.export(model, tmp_path / "out", target="llama.cpp")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AdapterError, match=r"pip install 'forgetless\[llama-cpp\]'"):
        forgetless.export(foreign(tiny_base("llama")), tmp_path / "out", target="llama.cpp")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    forgetless.export(foreign(tiny_base("llama")), tmp_path, target="llama.cpp")
    path = tmp_path / GGUF
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        lint_adapter(tmp_path, "llama.cpp")
    path.write_bytes(b"no GGUF at all")
    with pytest.raises(ArtefactError, match="begins with GGUF"):
        lint_adapter(tmp_path, "llama.cpp")


def test_lint_knows_the_two_kinds_of_folder(tmp_path: Path) -> None:
    model = foreign(tiny_base("llama"))
    forgetless.export(model, tmp_path / "peft")
    assert "got a folder that PEFT reads" in lint_adapter(tmp_path / "peft", "llama.cpp")[0]
    forgetless.export(model, tmp_path / "gguf", target="llama.cpp")
    with pytest.raises(AdapterError, match=r"found adapter\.gguf, which llama\.cpp reads"):
        lint_adapter(tmp_path / "gguf", "vllm")
    with pytest.raises(AdapterError, match="expected one GGUF file"):
        lint_adapter(tmp_path, "llama.cpp")
    assert (
        "got one for llama" in lint_adapter(tmp_path / "gguf", "llama.cpp", tiny_base("qwen2"))[0]
    )


PAIR_OF_RANK_2 = {"a": (2, 32), "b": (32, 2)}
BROKEN: dict[str, tuple[str, Callable[[GgufLora], None]]] = {
    "general.type": (
        "expected general.type adapter, got 'model'",
        lambda lora: lora.metadata.update({"general.type": "model"}),  # type: ignore[attr-defined]
    ),
    "pair": (
        "expected .lora_b beside blk.0.attn_q.weight.lora_a, found none",
        lambda lora: lora.tensors.pop("blk.0.attn_q.weight.lora_b"),  # type: ignore[attr-defined]
    ),
    "norm": (
        "got blk.0.attn_norm.weight, which llama.cpp ignores",
        lambda lora: lora.tensors.update({"blk.0.attn_norm.weight": torch.ones(32)}),  # type: ignore[attr-defined]
    ),
    "other": (
        "got blk.0.attn_q.bias, which llama.cpp refuses",
        lambda lora: lora.tensors.update({"blk.0.attn_q.bias": torch.ones(32)}),  # type: ignore[attr-defined]
    ),
    "alpha": (
        "expected adapter.lora.alpha = rank = 4, got 8.0",
        lambda lora: lora.metadata.update({"adapter.lora.alpha": 8.0}),  # type: ignore[attr-defined]
    ),
    "no alpha": (
        "expected adapter.lora.alpha = rank = 4, got None",
        lambda lora: lora.metadata.pop("adapter.lora.alpha"),  # type: ignore[attr-defined]
    ),
    "empty": (
        "expected A and B of at least one layer, got none",
        lambda lora: lora.tensors.clear(),  # type: ignore[attr-defined]
    ),
    "ranks": (
        "expected one rank in every layer, got [2, 4]",
        lambda lora: lora.tensors.update(  # type: ignore[attr-defined]
            {f"blk.0.attn_q.weight.lora_{x}": torch.ones(s) for x, s in PAIR_OF_RANK_2.items()}
        ),
    ),
    "one dimension": (
        "expected a matrix, got blk.0.attn_q.weight.lora_b of shape [32]",
        lambda lora: lora.tensors.update({"blk.0.attn_q.weight.lora_b": torch.ones(32)}),  # type: ignore[attr-defined]
    ),
    "one dimension in A": (
        "expected a matrix, got blk.0.attn_q.weight.lora_a of shape [4]",
        lambda lora: lora.tensors.update({"blk.0.attn_q.weight.lora_a": torch.ones(4)}),  # type: ignore[attr-defined]
    ),
    "NaN": (
        "got NaN or inf in blk.0.attn_q.weight.lora_b",
        lambda lora: lora.tensors["blk.0.attn_q.weight.lora_b"].fill_(float("nan")),
    ),
    "head": (
        "expected layers inside blocks (blk.0.…), got output.weight",
        lambda lora: lora.tensors.update(  # type: ignore[attr-defined]
            {"output.weight.lora_a": torch.ones(4, 32), "output.weight.lora_b": torch.ones(384, 4)}
        ),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_lint_names_what_llama_cpp_refuses_or_passes_over(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgetless.adapters.gguf import lint

    forgetless.export(foreign(tiny_base("llama")), tmp_path, target="llama.cpp")
    lora = read_lora(tmp_path / GGUF)
    breach, damage = BROKEN[what]
    damage(lora)
    monkeypatch.setattr(lint, "read_lora", lambda path: lora)
    assert any(breach in line for line in lint_adapter(tmp_path, "llama.cpp"))


def test_lint_names_a_layer_that_the_base_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgetless.adapters.gguf import lint

    model = foreign(tiny_base("llama"))
    forgetless.export(model, tmp_path, target="llama.cpp")
    lora = read_lora(tmp_path / GGUF)
    more = {f"blk.0.ffn_gate_inp.weight.lora_{x}": torch.ones(4, 4) for x in "ab"}
    lora.tensors.update(more)  # type: ignore[attr-defined]
    monkeypatch.setattr(lint, "read_lora", lambda path: lora)
    [breach] = lint_adapter(tmp_path, "llama.cpp", model)
    assert "expected layers of llama, got blk.0.ffn_gate_inp.weight" in breach


def test_what_a_target_cannot_take_is_refused_before_anything_is_calibrated(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgetless.adapters.export.metric_on", None)
    model = foreign(tiny_base("mixtral"), target_modules=["q_proj"])
    cut = {"max_rank": 2, "moments_data": ["one text", "two texts"], "tokenizer": tiny_tokenizer}
    with pytest.raises(AdapterError, match="got mixtral, whose layers"):
        forgetless.export(model, tmp_path / "out", target="llama.cpp", **cut)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AdapterError, match=r"forgetless\[llama-cpp\]"):
        forgetless.export(foreign(tiny_base("llama")), tmp_path / "out", target="llama.cpp", **cut)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# --- the command


def status(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_writes_compares_and_gives_a_card(
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    base = forgetless.load_model(str(tiny_model_path), dtype="float32", device="cpu").model
    foreign(base, rank_pattern={"down_proj": 2}).save_pretrained("theirs")
    assert status("export", "theirs", "out", "--target", "llama.cpp", "--max-rank", "3") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "LoRA of rank 3 as adapter.gguf for llama.cpp: out" in out
    assert "reloaded: logits differ by at most" in out
    assert "forgetless evaluate" not in out  # PEFT loads no GGUF
    card = Path("out/README.md").read_text()
    assert 'lora_path="this-folder/adapter.gguf"' in card
    assert "LoRA of rank 3, alpha 3, on " in card
    assert "library_name: gguf" in card
    assert str(tmp_path) not in card

    assert status("export", "out", "again") == 2
    assert "found adapter.gguf, which llama.cpp reads" in capsys.readouterr().err
    assert status("inspect", "out") == 2
    assert "a GGUF file, which llama.cpp reads" in capsys.readouterr().err
    command = ["export", "theirs", "json", "--target", "llama.cpp", "--json"]
    assert status(*command) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "llama.cpp"

    monkeypatch.setattr("forgetless.experiments.exporting.metric_on", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    cut = ["--max-rank", "3", "--moments-data", "self"]
    assert status("export", "theirs", "none", "--target", "llama.cpp", *cut) == 2
    assert "pip install 'forgetless[llama-cpp]'" in capsys.readouterr().err
    assert not Path("none").exists()
