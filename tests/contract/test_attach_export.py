"""attach → train → export: what an export is, whose it is, and what is refused.

That every method starts at the base and comes back from its folders is the battery's to test.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from forgetless.adapters.attach import attach
from forgetless.adapters.export import export, save_merged
from forgetless.adapters.load import load_adapter
from forgetless.adapters.round_trip import check_round_trip
from forgetless.errors import AdapterError, ArtefactError, CalibrationError, MethodError

IDS = torch.arange(5, 29).reshape(2, 12)
PRESERVE = [
    f"The capital of country {i} is city {i * 7 % 13}, and it rains there." for i in range(40)
]
TRAIN = [f"Question: {i} apples and {i} apples? Answer: {2 * i} apples." for i in range(40)]


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def attached(
    model: nn.Module, tokenizer: object, method: dict[str, object], **more: object
) -> PeftModel:
    return attach(
        model,
        tokenizer,  # type: ignore[arg-type]
        method=method,
        rank=4,
        preserve_data=PRESERVE,
        train_data=TRAIN,
        **more,  # type: ignore[arg-type]
    )


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", ["lora", "sc-lora"])
def test_half_an_update_is_merged_as_it_is_exported(
    tiny_model: nn.Module, tiny_tokenizer: object, method: str, tmp_path: Path
) -> None:
    model = attached(tiny_model, tiny_tokenizer, {"name": method})
    train(model)
    tuned = logits(model)
    export(model, tmp_path / "adapter")
    trip = check_round_trip(model, tmp_path / "adapter", IDS)
    assert trip.max_difference < 1e-5 * max(trip.max_logit, 1)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), tuned)

    save_merged(model, tmp_path / "merged", scale=0.5)
    merged = type(tiny_model).from_pretrained(tmp_path / "merged")
    half = attach_half(model, tmp_path)
    torch.testing.assert_close(logits(merged), half, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), tuned)


def attach_half(model: PeftModel, folder: Path) -> torch.Tensor:
    """Logits with half the update, by PEFT on an export with scale 0.5."""
    export(model, folder / "half", scale=0.5)
    model.load_adapter(str(folder / "half"), "halved")
    model.set_adapter("halved")
    found = logits(model)
    model.set_adapter("default")
    model.delete_adapter("halved")
    return found


def test_an_export_loads_in_a_process_without_forgetless(
    tiny_model: nn.Module, tiny_tokenizer: object, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(str(tmp_path / "base"))
    model = attached(tiny_model, tiny_tokenizer, {"name": "lora-null", "trains": "both"})
    train(model)
    export(model, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    save_file({"logits": logits(model)}, tmp_path / "logits.safetensors")
    script = (
        "import sys\n"
        "sys.modules['forgetless'] = None\n"
        "import torch\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "from safetensors.torch import load_file\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + '/adapter').eval()\n"
        "expected = load_file(sys.argv[1] + '/logits.safetensors')['logits']\n"
        "ids = torch.arange(5, 29).reshape(2, 12)\n"
        "with torch.no_grad():\n"
        "    found = model(input_ids=ids).logits\n"
        "torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_export_is_what_servers_accept(
    tiny_model: nn.Module, tiny_tokenizer: object, tmp_path: Path
) -> None:
    model = attached(tiny_model, tiny_tokenizer, {"name": "sc-lora"})
    export(model, tmp_path)
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha) == (8, 8)  # rank 4, form both: 2r
    assert config.init_lora_weights is True
    assert not config.rank_pattern
    assert not config.alpha_pattern
    assert not config.modules_to_save
    assert not config.use_rslora
    assert not config.use_dora
    assert not config.lora_bias
    assert set(config.target_modules) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    shapes = {
        t.shape[0 if "lora_A" in n else 1]
        for n, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    assert shapes == {8}


@pytest.mark.compatibility(feature="rank_pattern", export="peft")
@pytest.mark.compatibility(feature="alpha_pattern", export="peft")
@pytest.mark.compatibility(feature="rsLoRA", export="peft")
def test_somebody_elses_lora_is_exported_with_its_scale_and_patterns(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"q_proj": 3},
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_model, config)
    expected = logits(model)
    export(model, tmp_path)
    assert check_round_trip(model, tmp_path, IDS).max_difference < 1e-4
    reloaded = PeftModel.from_pretrained(model.unload(), str(tmp_path))
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-5)


def test_moments_of_a_base_do_not_depend_on_an_adapter_around_it(
    tiny_model: nn.Module, tiny_tokenizer: object
) -> None:
    expected = logits(tiny_model)
    first = attached(tiny_model, tiny_tokenizer, {"name": "lora-null"})
    train(first)
    second = attached(first, tiny_tokenizer, {"name": "lora-null"}, adapter="second")
    for name, parameter in second.named_parameters():
        if ".lora_A.second" in name:
            twin = second.get_parameter(name.replace(".second", ".default"))
            torch.testing.assert_close(parameter, twin, rtol=0, atol=0)
    with second.disable_adapter():
        assert torch.equal(logits(second), expected)


def test_a_refused_start_beside_another_adapter_leaves_that_one_as_it_was(
    tiny_model: nn.Module, tiny_tokenizer: object
) -> None:
    weight = tiny_model.get_submodule("model.layers.1.mlp.down_proj").weight
    model = attached(tiny_model, tiny_tokenizer, {"name": "lora-null"}, adapter="first")
    train(model)
    tuned, kept = logits(model), weight.detach().clone()
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj: expected finite weights"):
        attached(model, tiny_tokenizer, {"name": "sc-lora"}, adapter="second")
    with torch.no_grad():
        weight.copy_(kept)
    assert list(model.peft_config) == [model.active_adapter] == ["first"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == state
    assert torch.equal(logits(model), tuned)
    train(attached(model, tiny_tokenizer, {"name": "sc-lora"}, adapter="second"))


def test_bad_input_is_one_line(
    tiny_model: nn.Module, tiny_tokenizer: object, tmp_path: Path
) -> None:
    with pytest.raises(MethodError, match="needs preserve data: pass preserve_data"):
        attach(tiny_model, tiny_tokenizer, method="lora-null", rank=4)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="at most 16, the smaller width of layer"):
        attach(tiny_model, tiny_tokenizer, rank=32, preserve_data=PRESERVE)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="missing; add rows"):
        attach(tiny_model, tiny_tokenizer, rank=4, preserve_data=["two words"])  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"adapter_config\.json, found none"):
        load_adapter(tiny_model, tmp_path)  # type: ignore[arg-type]
    model = attached(tiny_model, tiny_tokenizer, {"name": "lora"})
    with pytest.raises(AdapterError, match="already there"):
        attached(model, tiny_tokenizer, {"name": "lora"})


@pytest.mark.parametrize("size", [0, 40, -5])
def test_a_truncated_adapter_is_refused(
    tiny_model: nn.Module, tiny_tokenizer: object, tmp_path: Path, size: int
) -> None:
    model = attached(tiny_model, tiny_tokenizer, {"name": "lora"})
    export(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        load_adapter(model.unload(), tmp_path)


def test_an_adapter_of_another_model_is_refused(
    tiny_model: nn.Module, tiny_gpt2: nn.Module, tiny_tokenizer: object, tmp_path: Path
) -> None:
    model = attached(tiny_model, tiny_tokenizer, {"name": "lora"})
    export(model, tmp_path)
    with pytest.raises(AdapterError, match="expected its own base"):
        load_adapter(tiny_gpt2, tmp_path)  # type: ignore[arg-type]


def test_an_adapter_of_a_model_with_other_widths_is_refused(
    tiny_model: nn.Module, tiny_tokenizer: object, tmp_path: Path
) -> None:
    model = attached(tiny_model, tiny_tokenizer, {"name": "lora"})
    export(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v[..., :3].contiguous() for k, v in tensors.items()}, path)
    with pytest.raises(AdapterError, match="does not fit this base model"):
        load_adapter(model.unload(), tmp_path)
