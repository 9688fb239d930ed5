"""Each rule of each engine: an adapter that breaks it is named, and rewritten where possible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import forgetless
from compatibility.cells import refuse
from forgetless.adapters.engines import LADDER, SGLANG, TGI, VLLM
from forgetless.adapters.export import EXPORT_TARGETS
from forgetless.adapters.export_target import ExportJob
from forgetless.adapters.lint import lint_adapter
from forgetless.errors import AdapterError, ArtefactError

IDS = torch.arange(5, 29).reshape(2, 12)
SERVERS = ("vllm", "sglang", "tgi")
MakeModel = Callable[..., PreTrainedModel]


def foreign(base: nn.Module, **options: Any) -> PeftModel:
    """Somebody's LoRA, B away from 0."""
    made = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **made)).eval()  # type: ignore[arg-type]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return values


# Breaks a rule of vLLM and SGLang; a plain LoRA can say the same in a way that they take.
REWRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "several ranks": (
        "expected every layer of rank r=8, got [2, 8]",
        {"rank_pattern": {"down_proj": 2}},
    ),
    "rank_pattern": (
        "expected no rank_pattern, got one for 1 layers",
        {"rank_pattern": {"down_proj": 2}},
    ),
    "alpha_pattern": (
        "expected no alpha_pattern, got one for 1 layers",
        {"alpha_pattern": {"q_proj": 3}},
    ),
    "alpha of its own": ("expected lora_alpha = r = 8, got 16", {"lora_alpha": 16}),
    "rsLoRA": ("expected no rsLoRA, got use_rslora=True", {"use_rslora": True}),
    "rank 9": ("512, got 9; forgetless export pads it with zeros", {"r": 9, "lora_alpha": 9}),
}


@pytest.mark.compatibility(feature="{what}", export="{target}")
@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize("what", REWRITTEN)
def test_what_can_be_rewritten_is_and_computes_the_same(
    make_tiny_model: MakeModel, tmp_path: Path, what: str, target: str
) -> None:
    breach, options = REWRITTEN[what]
    model = foreign(make_tiny_model(), **options)
    model.save_pretrained(str(tmp_path / "theirs"))
    assert any(breach in line for line in lint_adapter(tmp_path / "theirs", target))
    forgetless.export(model, tmp_path / "out", target=target)
    assert lint_adapter(tmp_path / "out", target) == []
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"]
    assert config["r"] in LADDER
    alone = PeftModel.from_pretrained(make_tiny_model(), str(tmp_path / "out"))
    torch.testing.assert_close(logits(alone), logits(model), rtol=1e-4, atol=1e-4)


# Breaks a rule in a way that A and B of linear layers cannot hold.
IMPOSSIBLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "modules_to_save": (
        "got modules that were trained in full (modules_to_save=",
        "train without modules_to_save",
        {"modules_to_save": ["embed_tokens"]},
    ),
    "trained biases": (
        "expected bias 'none', got 'lora_only'",
        "bias='none'",
        {"bias": "lora_only"},
    ),
    "lora_bias": ("got a bias in LoRA's B", "lora_bias=False", {"lora_bias": True}),
    "DoRA": ("got DoRA (use_dora=True)", "merge_and_unload", {"use_dora": True}),
    "trainable_token_indices": (
        "got trained token embeddings",
        "train without trainable_token_indices",
        {"trainable_token_indices": [3, 4]},
    ),
    "LoRA on an embedding": (
        "got the tensor base_model.model.model.embed_tokens.",
        "leave it out of target_modules",
        {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    "LoRA on the head": (
        "expected LoRA on linear layers below the head, got lm_head",
        "leave it out of target_modules",
        {"target_modules": ["q_proj", "lm_head"]},
    ),
}


@pytest.mark.compatibility(feature="{what}", export="{target}")
@pytest.mark.parametrize("target", SERVERS)
@pytest.mark.parametrize("what", IMPOSSIBLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_rewritten_is_an_error_with_a_remedy(
    make_tiny_model: MakeModel,
    tmp_path: Path,
    what: str,
    target: str,
    request: pytest.FixtureRequest,
) -> None:
    breach, remedy, options = IMPOSSIBLE[what]
    model = foreign(make_tiny_model(attention_bias=True, tie_word_embeddings=False), **options)
    model.save_pretrained(str(tmp_path / "theirs"))
    assert any(breach in line for line in lint_adapter(tmp_path / "theirs", target))
    with pytest.raises(AdapterError, match=remedy.replace("(", r"\(")) as caught:
        forgetless.export(model, tmp_path / "out", target=target)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    refuse(request, str(caught.value).rpartition("; ")[2])


def test_another_kind_of_adapter_is_named(tmp_path: Path, tiny_model: nn.Module) -> None:
    foreign(tiny_model).save_pretrained(str(tmp_path))
    config = config_of(tmp_path) | {"peft_type": "IA3"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "expected peft_type LORA, got IA3" in lint_adapter(tmp_path, "peft")[0]


def test_peft_takes_everything_that_peft_wrote(tmp_path: Path, tiny_model: nn.Module) -> None:
    options = {"r": 5, "rank_pattern": {"q_proj": 3}, "use_rslora": True}
    foreign(tiny_model, **options).save_pretrained(str(tmp_path))
    assert lint_adapter(tmp_path, "peft") == []


@pytest.mark.parametrize("engine", [VLLM, SGLANG])
@pytest.mark.parametrize(
    ("rank", "padded"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (321, 512), (512, 512), (513, 513)],
)
def test_a_rank_goes_up_to_the_next_step_of_the_ladder(engine: Any, rank: int, padded: int) -> None:
    assert engine.padded(rank) == padded


def test_tgi_takes_any_one_rank() -> None:
    assert TGI.padded(9) == 9


def test_zeros_are_what_a_rank_is_padded_with(tiny_model: nn.Module, tmp_path: Path) -> None:
    model = foreign(tiny_model, r=3, lora_alpha=3)
    forgetless.export(model, tmp_path / "peft")
    forgetless.export(model, tmp_path / "vllm", target="vllm")
    plain = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    padded = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    assert plain.keys() == padded.keys()
    for name, tensor in padded.items():
        kept = tensor[:3] if "lora_A" in name else tensor[:, :3]
        rest = tensor[3:] if "lora_A" in name else tensor[:, 3:]
        assert torch.equal(kept, plain[name])
        assert rest.numel() == 5 * (tensor.numel() // 8)
        assert not rest.any()


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.filterwarnings("ignore:export. rank 600 is cut")
def test_a_rank_beyond_the_ladder_is_an_error_and_the_remedy_works(
    make_tiny_model: MakeModel, tmp_path: Path, target: str
) -> None:
    model = foreign(make_tiny_model(), r=600, lora_alpha=600, target_modules=["q_proj"])
    model.save_pretrained(str(tmp_path / "theirs"))
    expected = "expected a rank of at most 512, got 600; compress it with --max-rank 512"
    assert lint_adapter(tmp_path / "theirs", target) == [expected]
    with pytest.raises(AdapterError, match=f"for {target} {expected}"):
        forgetless.export(model, tmp_path / "out", target=target)
    assert not any((tmp_path / "out").iterdir())
    forgetless.export(model, tmp_path / "out", target=target, max_rank=512)
    assert lint_adapter(tmp_path / "out", target) == []
    alone = PeftModel.from_pretrained(make_tiny_model(), str(tmp_path / "out"))
    torch.testing.assert_close(logits(alone), logits(model), rtol=1e-3, atol=1e-3)


def test_tgi_gets_every_layer_of_a_type(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    model = foreign(make_tiny_model(), layers_to_transform=[1], target_modules=["q_proj", "v_proj"])
    model.save_pretrained(str(tmp_path / "theirs"))
    (found,) = lint_adapter(tmp_path / "theirs", "tgi", make_tiny_model())
    assert "2 are missing, the first model.layers.0.self_attn.q_proj" in found
    (unknown,) = lint_adapter(tmp_path / "theirs", "tgi")
    assert "pass model=" in unknown
    modules = [name for name, _ in model.named_modules()]
    forgetless.export(model, tmp_path / "out", target="tgi")
    check = EXPORT_TARGETS["tgi"].compare(ExportJob(model=model, folder=tmp_path / "out"), IDS)
    assert check.max_difference < 1e-4
    assert [name for name, _ in model.named_modules()] == modules  # nothing stays wrapped
    assert lint_adapter(tmp_path / "out", "tgi", make_tiny_model()) == []
    assert set(config_of(tmp_path / "out")["target_modules"]) == {"q_proj", "v_proj"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(t.any() for name, t in tensors.items() if ".layers.0." in name)
    alone = PeftModel.from_pretrained(make_tiny_model(), str(tmp_path / "out"))
    torch.testing.assert_close(logits(alone), logits(model), rtol=1e-4, atol=1e-4)


def test_a_filled_layer_that_is_not_zero_fails_the_round_trip(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    model = foreign(tiny_model, layers_to_transform=[1], target_modules=["q_proj"])
    forgetless.export(model, tmp_path, target="tgi")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] += 1
    save_file(tensors, weights)
    job = ExportJob(model=model, folder=tmp_path)
    with pytest.raises(AdapterError, match=r"expected zeros at layer model\.layers\.0"):
        EXPORT_TARGETS["tgi"].compare(job, IDS)


@pytest.mark.compatibility(base="gpt2", export="{target}")
@pytest.mark.parametrize("target", SERVERS)
def test_gpt2_s_transposed_layers_are_exported_alike(
    tiny_gpt2: nn.Module, tmp_path: Path, target: str
) -> None:
    model = foreign(tiny_gpt2, r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    expected = logits(model)
    forgetless.export(model, tmp_path, target=target)
    assert PeftConfig.from_pretrained(str(tmp_path)).fan_in_fan_out
    alone = PeftModel.from_pretrained(model.unload(), str(tmp_path))
    torch.testing.assert_close(logits(alone), expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_target_is_one_line(tiny_model: nn.Module, tmp_path: Path) -> None:
    model = foreign(tiny_model)
    with pytest.raises(AdapterError, match=r"one of peft, vllm, sglang, tgi, llama\.cpp, "):
        forgetless.export(model, tmp_path / "out", target="triton")
    with pytest.raises(AdapterError, match="got 'merged'; only engines"):
        lint_adapter(tmp_path, "merged")


def test_a_damaged_folder_is_one_line(tiny_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json, found none"):
        lint_adapter(tmp_path, "vllm")
    foreign(tiny_model).save_pretrained(str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        lint_adapter(tmp_path, "vllm")
    weights.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors, found none"):
        lint_adapter(tmp_path, "vllm")
