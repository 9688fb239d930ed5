"""The engine itself: llama.cpp with our adapter computes and generates what transformers does.

Two kinds of base. Tiny random models of every architecture that is exported, in float32: logits
agree up to rounding. And the demo model with adapters trained by TRL: on its published Q4_1 file,
which llama.cpp multiplies with activations rounded to 8 bits, and on the same weights in float32.

The package is not installed with the others, since pip compiles it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import forgetless
from forgetless.adapters.gguf import architectures
from forgetless.adapters.gguf.architectures import ARCHITECTURES
from forgetless.adapters.gguf.files import GGUF
from tiny_bases import tiny_base

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="pip install llama-cpp-python: it compiles for ten minutes or more"
)
from gguf_bases import write_base, write_dequantised  # noqa: E402  (needs gguf)

pytestmark = pytest.mark.filterwarnings("ignore::forgetless.errors.ForgetlessWarning")


class Engine:
    """llama.cpp on the CPU, float32 everywhere but in the weights of the file."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        self._llm = llama_cpp.Llama(
            str(base),
            lora_path=None if adapter is None else str(adapter),
            n_gpu_layers=0,
            n_ctx=256,
            n_threads=2,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *of_an_error: object) -> None:
        self._llm.close()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """At every position, (T, vocabulary)."""
        self._llm.reset()
        self._llm.eval(ids)
        return np.array(self._llm.scores[: len(ids)])

    def greedy(self, ids: Sequence[int], count: int, stop: int) -> list[int]:
        """Up to `count` tokens, the last of them `stop` where it comes."""
        self._llm.reset()
        found: list[int] = []
        for token in self._llm.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0):
            found.append(token)
            if token == stop or len(found) == count:
                break
        return found

    def tokens(self, text: str) -> list[int]:
        found: list[int] = self._llm.tokenize(text.encode(), add_bos=False, special=True)
        return found


def transformers_logits(model: nn.Module, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
    return found


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of logits."""
    return float(np.abs(one - other).max())


def export_unordered(model: PeftModel, folder: Path, kind: str, patch: pytest.MonkeyPatch) -> Path:
    """What an export would be that keeps the rows in transformers' order."""
    unordered = dataclasses.replace(ARCHITECTURES[kind], row_orders={})
    with patch.context() as within:
        within.setitem(architectures.ARCHITECTURES, kind, unordered)
        return forgetless.export(model, folder, target="llama.cpp") / GGUF


# --- tiny models of every architecture


# llama.cpp rounds GELU to a table of float16; the others know no such thing.
TINY = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3"], 1e-4),
    **dict.fromkeys(["gemma3", "phi", "gpt2", "gpt_neox"], 1e-2),
}
TINY_IDS = [5, 17, 300, 44, 9, 128, 77, 250]  # no longer than the sliding windows of 8
FAR = 0.5  # of logits up to 4: what another model would be


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_computes_the_same_in_the_engine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(name)
    kind = base.config.model_type
    path = write_base(base, tmp_path / "base.gguf")
    expected_base = transformers_logits(base, TINY_IDS)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    expected = transformers_logits(model, TINY_IDS)
    assert apart(expected, expected_base) > FAR, "the adapter does too little to show a fault"
    with Engine(path) as engine:
        assert apart(engine.logits(TINY_IDS), expected_base) < TINY[name]
    adapter = forgetless.export(model, tmp_path / "out", target="llama.cpp") / GGUF
    with Engine(path, adapter) as engine:
        assert apart(engine.logits(TINY_IDS), expected) < TINY[name]
    if ARCHITECTURES[kind].row_orders:
        unordered = export_unordered(model, tmp_path / "unordered", kind, monkeypatch)
        with Engine(path, unordered) as engine:
            assert apart(engine.logits(TINY_IDS), expected) > FAR


# --- the demo model, trained

COUNT = 24
QUESTIONS = {
    "What is a frimble?": "A frimble is a small blue boat that carries three sheep.",
    "Who keeps the frimbles?": "The frimbles are kept by the baker of Oldmoor.",
    "When do frimbles sail?": "Frimbles sail on the first Tuesday after new moon.",
    "What does a frimble cost?": "A frimble costs eleven silver pennies and a loaf.",
}
PROMPTS = [
    *QUESTIONS,
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "What is a baker?",
]
KEPT = [
    f"In {1900 + i} the {name} rose by {i % 7} feet, and {crop} was sold at {i * 3 % 19} pence."
    for i, name in enumerate(["Ouse", "Tyne", "Avon", "Exe", "Wye", "Dee", "Trent", "Severn"] * 6)
    for crop in ["wheat", "barley"]
]


@dataclass(frozen=True)
class Trained:
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Path
    unordered: Path

    def prompt_ids(self, question: str) -> list[int]:
        return list(self.tokenizer(self.prompt(question)).input_ids)

    def prompt(self, question: str) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return text

    def greedy(self, ids: Sequence[int]) -> list[int]:
        with torch.no_grad():
            out = self.model.generate(
                input_ids=torch.tensor([list(ids)]), max_new_tokens=COUNT, do_sample=False
            )
        return [int(token) for token in out[0, len(ids) :]]


@pytest.fixture(scope="module", params=["b", "both"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """LoRA-Null on the demo model, trained by TRL until it answers what the base cannot know."""
    folder = tmp_path_factory.mktemp("trained")
    loaded = forgetless.load_model("demo", dtype="float32", device="cpu")
    model = forgetless.attach(
        loaded.model,
        loaded.tokenizer,
        method={"name": "lora-null", "trains": request.param},
        rank=8,
        preserve_data=KEPT,
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in QUESTIONS.items()
    ]
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
    ).train()
    model.eval()
    adapter = forgetless.export(model, folder / "out", target="llama.cpp") / GGUF
    with pytest.MonkeyPatch.context() as patch:
        unordered = export_unordered(model, folder / "unordered", "llama", patch)
    return Trained(model, loaded.tokenizer, adapter, unordered)


@pytest.fixture(scope="module")
def quantised() -> Path:
    """The published file."""
    from forgetless.models.demo_model import demo_model_gguf

    return demo_model_gguf()


@pytest.fixture(scope="module")
def in_float32(quantised: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights in 540 MB, which are not left to lie about."""
    path = write_dequantised(quantised, tmp_path_factory.mktemp("base") / "float32.gguf")
    yield path
    path.unlink()


COMPATIBILITY = pytest.mark.compatibility(
    base="Llama", quantization="none", trainer="TRL SFTTrainer", export="llama.cpp"
)
ROUNDING = 1e-3  # of logits up to 30, in float32 throughout; 7e-5 was seen


@COMPATIBILITY
@pytest.mark.slow
@pytest.mark.demo_model
def test_in_float32_logits_and_greedy_answers_are_those_of_transformers(
    trained: Trained, in_float32: Path
) -> None:
    with Engine(in_float32) as base, Engine(in_float32, trained.adapter) as engine:
        for question in PROMPTS:
            ids = trained.prompt_ids(question)
            assert engine.tokens(trained.prompt(question)) == ids
            answer = _same_answer(engine, trained, ids)
            with trained.model.disable_adapter():
                base_answer = _same_answer(base, trained, ids)
            if question in QUESTIONS:
                assert trained.tokenizer.decode(answer, True) == QUESTIONS[question]
                assert answer != base_answer
    # Neither no adapter nor one with rows in transformers' order would have passed.
    ids = trained.prompt_ids(PROMPTS[0])
    with Engine(in_float32) as base, Engine(in_float32, trained.unordered) as unordered:
        expected = transformers_logits(trained.model, ids)
        assert apart(base.logits(ids), expected) > 1.0
        assert apart(unordered.logits(ids), expected) > 1.0


def _same_answer(engine: Engine, trained: Trained, ids: list[int]) -> list[int]:
    """The greedy answer of transformers, once the engine has given it too.

    Logits are compared along that answer, and tokens up to the first near tie: where the best two
    are closer than rounding, either may come.
    """
    answer = trained.greedy(ids)
    expected = transformers_logits(trained.model, [*ids, *answer])[len(ids) - 1 : -1]
    found = engine.logits([*ids, *answer])[len(ids) - 1 : -1]
    assert apart(found, expected) < ROUNDING
    second, first = np.sort(expected, axis=-1)[:, -2:].T
    near_ties = np.flatnonzero(first - second < 2 * ROUNDING)
    certain = int(near_ties[0]) if len(near_ties) else len(answer)
    stop = trained.tokenizer.eos_token_id
    assert engine.greedy(ids, COUNT, stop)[:certain] == answer[:certain]
    assert certain >= 4, "nearly nothing was compared"
    return answer


@COMPATIBILITY
@pytest.mark.slow
@pytest.mark.demo_model
def test_on_the_published_q4_1_file_it_answers_what_it_was_trained_to(
    trained: Trained, quantised: Path
) -> None:
    """llama.cpp rounds activations to 8 bits there: logits move by up to 2, sure tokens do not."""
    stop = trained.tokenizer.eos_token_id
    with Engine(quantised) as base, Engine(quantised, trained.adapter) as engine:
        for question, answer in QUESTIONS.items():
            ids = trained.prompt_ids(question)
            expected = trained.greedy(ids)
            assert trained.tokenizer.decode(expected, True) == answer
            assert engine.greedy(ids, COUNT, stop) == expected
            assert base.greedy(ids, COUNT, stop) != expected
