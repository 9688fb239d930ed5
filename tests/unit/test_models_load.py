from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaModel, PreTrainedModel

from forgetless.errors import ForgetlessError, ModelError
from forgetless.models import hardware
from forgetless.models.load import (
    cache_dir,
    describe_hardware,
    has_fast_bf16,
    load_model,
    model_fingerprint,
    pick_device,
    pick_dtype,
)

CPU = torch.device("cpu")


def with_lora(model: PreTrainedModel, **options: object) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))


def test_a_folder_loads_with_its_tokenizer(tiny_model_path: Path) -> None:
    loaded = load_model(str(tiny_model_path), dtype="float32", device="cpu")
    assert loaded.model.dtype is loaded.dtype is torch.float32
    assert loaded.device == loaded.model.device == CPU
    assert not loaded.model.training
    assert loaded.tokenizer("hi")["input_ids"][0] == loaded.tokenizer.bos_token_id
    assert (loaded.name, loaded.revision) == (str(tiny_model_path), None)


def test_loaded_weights_are_the_saved_ones(
    tiny_model: PreTrainedModel, tiny_model_path: Path
) -> None:
    loaded = load_model(str(tiny_model_path), dtype="float32", device="cpu")
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded.model(ids).logits, tiny_model(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_asked_for_is_the_dtype_loaded(
    tiny_model_path: Path, dtype: str | torch.dtype
) -> None:
    loaded = load_model(str(tiny_model_path), dtype=dtype, device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_loading_a_folder_prints_nothing(
    tiny_model_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(str(tiny_model_path), device="cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./no/such/folder", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("some/deeply/nested/name", "does not exist"),
        ("somebody/a-model-nobody-has", "expected a folder or a reachable hub id"),
        ("not a valid id", "expected a folder or a reachable hub id"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_line(name: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert says in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_an_empty_folder_and_an_adapter_are_named_as_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, says in [
        ("model.gguf", "the file"),
        ("empty", "config.json"),
        ("adapter", "adapter"),
    ]:
        with pytest.raises(ModelError, match=says):
            load_model(str(tmp_path / name))


def test_a_truncated_config_is_one_clear_line(tiny_model_path: Path) -> None:
    (tiny_model_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ModelError, match="expected a readable model") as caught:
        load_model(str(tiny_model_path))
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_one_clear_line(tiny_model_path: Path) -> None:
    weights = tiny_model_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="expected a readable model") as caught:
        load_model(str(tiny_model_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_one_clear_line(tiny_model_path: Path) -> None:
    (tiny_model_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="expected a readable model"):
        load_model(str(tiny_model_path), device="cpu")


def test_a_folder_without_a_tokenizer_says_so(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="tokenizer: expected one"):
        load_model(str(tmp_path / "bare"), device="cpu")


def test_an_encoder_is_refused(save_model: Callable[..., Path]) -> None:
    config = BertConfig(
        vocab_size=384,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(ModelError, match="expected a causal language model, got BertForMaskedLM"):
        load_model(str(save_model(BertForMaskedLM(config))), device="cpu")


def test_a_model_saved_without_its_head_is_refused(
    make_tiny_model: Callable[..., PreTrainedModel], save_model: Callable[..., Path]
) -> None:
    headless = make_tiny_model(tie_word_embeddings=False).model
    assert isinstance(headless, LlamaModel)
    with pytest.raises(ModelError, match="expected a causal language model, got LlamaModel"):
        load_model(str(save_model(headless)), device="cpu")


def test_missing_weights_are_refused_and_named(
    make_tiny_model: Callable[..., PreTrainedModel], save_model: Callable[..., Path]
) -> None:
    folder = save_model(make_tiny_model(tie_word_embeddings=False).model)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"1 are missing, first 'lm_head\.weight'"):
        load_model(str(folder), device="cpu")


def test_a_model_with_its_own_code_is_not_run_unasked(tiny_model_path: Path) -> None:
    config = json.loads((tiny_model_path / "config.json").read_text())
    config.update(
        model_type="strange", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )
    (tiny_model_path / "config.json").write_text(json.dumps(config))
    (tiny_model_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        load_model(str(tiny_model_path))


@pytest.mark.parametrize(
    "options", [{"device": "cuda:99"}, {"device": "abacus"}, {"dtype": "int3"}]
)
def test_an_impossible_device_or_dtype_is_a_user_error(
    tiny_model_path: Path, options: dict[str, str]
) -> None:
    with pytest.raises(ForgetlessError, match="use auto"):
        load_model(str(tiny_model_path), **options)


def test_the_commit_of_a_hub_model_is_kept(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    tiny_model_path.rename(repository / "snapshots" / commit)
    # Read when huggingface_hub is imported, so another process has to load it.
    code = (
        "from forgetless.models.load import load_model\n"
        "loaded = load_model('somebody/tiny', device='cpu')\n"
        "print(loaded.revision, loaded.name)"
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [commit, "somebody/tiny"]


# --- hardware


def test_bf16_is_picked_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, fast in [
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "amx_tile": True}, True),
        ({"amx_bf16": False, "avx512_bf16": False}, False),
        ({"neon": True, "bf16": True}, True),
    ]:
        monkeypatch.setattr(hardware.torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert has_fast_bf16(CPU) is fast
        assert pick_dtype(CPU) is (torch.bfloat16 if fast else torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_bf16_detection_agrees_with_the_kernel() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16", "svebf16"))
    assert has_fast_bf16(CPU) is expected


def test_mps_stays_in_float32() -> None:
    assert pick_dtype(torch.device("mps")) is torch.float32


def test_auto_device_is_one_that_works() -> None:
    assert torch.zeros(2, device=pick_device()).sum() == 0


def test_hardware_description_is_words_for_a_record() -> None:
    facts = describe_hardware()
    assert {"cpu", "cores", "memory", "cpu_bf16", "device"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())
    assert int(facts["cores"]) >= 1


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FORGETLESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "forgetless"


# --- fingerprint


def test_fingerprint_survives_saving_and_loading(
    tiny_model: PreTrainedModel, tiny_model_path: Path
) -> None:
    loaded = load_model(str(tiny_model_path), dtype="float32", device="cpu").model
    assert model_fingerprint(loaded) == model_fingerprint(tiny_model)


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_gpt2"])
def test_fingerprint_ignores_adapters(fixture: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(fixture)
    before = model_fingerprint(model)
    assert len(before) == 16
    peft_model = with_lora(model)
    assert model_fingerprint(peft_model) == before
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    assert model_fingerprint(peft_model) == before
    assert model_fingerprint(peft_model.base_model) == before
    assert model_fingerprint(peft_model.get_base_model()) == before


def test_fingerprint_ignores_trained_copies_of_whole_modules(tiny_model: PreTrainedModel) -> None:
    before = model_fingerprint(tiny_model)
    peft_model = with_lora(tiny_model, modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    assert model_fingerprint(peft_model) == before


def test_fingerprint_tells_a_merged_model_from_its_base(tiny_model: PreTrainedModel) -> None:
    before = model_fingerprint(tiny_model)
    peft_model = with_lora(tiny_model, init_lora_weights=False)
    assert model_fingerprint(peft_model.merge_and_unload()) != before


def test_fingerprint_tells_seed_dtype_tying_and_architecture_apart(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_gpt2: PreTrainedModel
) -> None:
    models = [
        make_tiny_model(),
        make_tiny_model(seed=1),
        make_tiny_model().to(torch.bfloat16),
        make_tiny_model(tie_word_embeddings=False),
        make_tiny_model(num_hidden_layers=1),
        tiny_gpt2,
    ]
    assert len({model_fingerprint(model) for model in models}) == len(models)


def test_fingerprint_sees_a_change_in_any_column_of_a_wide_matrix() -> None:
    # Width 2048: a stride of 1024 would see two columns only.
    layer = nn.Linear(2048, 2048, bias=False)
    before = model_fingerprint(layer)
    for column in (1, 7, 1000, 2047):
        with torch.no_grad():
            layer.weight[:, column] += 1.0
        after = model_fingerprint(layer)
        assert after != before
        before = after


def test_fingerprint_counts_weights_that_are_stored_as_buffers() -> None:
    # GPTQ and AWQ layers keep their packed weights in buffers.
    layer = nn.Module()
    layer.register_buffer("qweight", torch.arange(8, dtype=torch.int32))
    layer.register_buffer("scratch", torch.zeros(3), persistent=False)
    before = model_fingerprint(layer)
    layer.scratch += 1
    assert model_fingerprint(layer) == before
    layer.qweight += 1
    assert model_fingerprint(layer) != before
