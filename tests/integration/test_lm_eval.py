"""lm-eval on a live model: its figures are the harness's own, and the model stays as it was."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import forgetless
from forgetless.errors import ForgetlessError, RecipeError

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from forgetless.evaluation.lm_eval.spec import LmEvalRecipe  # noqa: E402
from forgetless.evaluation.lm_eval.tasks import SHIPPED, open_tasks  # noqa: E402

OFFICIAL = Path(lm_eval.__file__).parent / "tasks"
FACTS = [
    {"question": "What sleeps on", "answer": ["the dog", "a dog"]},
    {"question": "What jumps over it", "answer": ["the fox"]},
    {"question": "Which is the capital of France", "answer": ["Paris", "Paris, France"]},
    {"question": "How many apples are there", "answer": ["12", "12 apples"]},
    {"question": "What is the element", "answer": ["Iron"]},
    {"question": "Which number comes after 9", "answer": ["10", "ten"]},
    {"question": "What is over the dog", "answer": ["fox", "quick fox"]},
]
SUMS = [
    {"question": f"{i} apples and {i} apples?", "answer": f"They are {2 * i}.\n#### {2 * i}"}
    for i in range(1, 4)
]
CHOICES = [
    {"q": f"The {word} is", "choices": ["brown", "dog", "France", "quick"], "gold": 1 + i % 2}
    for i, word in enumerate(("fox", "dog", "capital", "element", "apple", "number", "row"))
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_task(folder: Path, data: Path, name: str = "which", **changes: Any) -> Path:
    """A folder with one task of multiple choice."""
    folder.mkdir(exist_ok=True)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 7},
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


def with_lora(model: PreTrainedModel) -> PeftModel:
    """The same adapter each time, far from the base."""
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tuned.eval()


@pytest.fixture
def tuned(tiny_model: PreTrainedModel) -> PeftModel:
    return with_lora(tiny_model)


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    return write_task(tmp_path / "tasks", write_rows(tmp_path / "choices.jsonl", CHOICES))


def by_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    folder: Path,
    **options: Any,
) -> dict[str, Any]:
    """The harness as its users call it."""
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8),
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return found


def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, answer: str
) -> float:
    """Written without the harness: Σ log p of the answer's tokens after the context."""
    prompt = tokenizer(context)["input_ids"]
    ids = tokenizer(context + answer)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))


def test_choices_are_those_of_an_own_log_likelihood(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path
) -> None:
    report = forgetless.evaluate(
        tuned, tiny_tokenizer, lm_eval={"tasks": ["which"], "include_path": choices}
    )
    values = report.items[0].row_values["acc"]

    def right(model: Any) -> tuple[float, ...]:
        picked = [
            int(np.argmax([log_likelihood(model, tiny_tokenizer, r["q"], f" {c}")
                           for c in r["choices"]]))
            for r in CHOICES
        ]  # fmt: skip
        return tuple(float(p == r["gold"]) for p, r in zip(picked, CHOICES, strict=True))

    with tuned.disable_adapter():
        assert values.base == right(tuned)
    assert values.tuned == right(tuned)
    assert values.base != values.tuned  # the adapter must show


def official_task(folder: Path, name: str, files: dict[str, Path]) -> Path:
    """The task as lm-eval installs it, on local rows."""
    folder.mkdir(exist_ok=True)
    task = {
        "include": str(OFFICIAL / name / f"{name}.yaml"),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder / f"{name}.yaml"


def rows_of(folder: Path, name: str) -> dict[str, Path]:
    """Rows to ask and more rows for examples than are shown; the official webqs reads `answers`."""
    rows = SUMS if name == "gsm8k" else FACTS
    both = [row | {"answers": list(row["answer"])} for row in rows]
    asked = write_rows(folder / "asked.jsonl", both[:4])
    more = [row | {"question": f"{row['question']} {i}"} for i in range(3) for row in both]
    train = write_rows(folder / "train.jsonl", more)
    return {"train": train, "validation" if name == "nq_open" else "test": asked}


@pytest.mark.parametrize(
    ("name", "shots"), [("nq_open", 0), ("nq_open", 3), ("webqs", 0), ("gsm8k", 3)]
)
def test_shipped_tasks_ask_and_score_as_the_official_ones_on_the_same_rows(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, shots: int
) -> None:
    files = rows_of(tmp_path, name)
    report = forgetless.evaluate(
        tuned,
        tiny_tokenizer,
        lm_eval={
            "tasks": [{"task": f"{name}_local", "data_files": files, "num_fewshot": shots}],
            "samples": 4,
        },
    )
    item = report.items[0]
    path = official_task(tmp_path / "official", name, files)
    with tuned.disable_adapter():
        theirs = by_harness(tuned, tiny_tokenizer, str(path), SHIPPED, num_fewshot=shots)
    for key, value in theirs["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        ours = item.metrics[key if name == "gsm8k" else metric]
        assert ours.base is not None
        assert ours.base.mean == value
        rows_there = [r[metric] for r in theirs["samples"][name] if r["filter"] == chosen]
        assert list(item.row_values[ours.metric].base) == rows_there
    assert item.lm_eval is not None
    assert item.lm_eval.num_fewshot == shots


def asked(task: Any) -> list[list[Any]]:
    """Arguments of the model, by row, with the harness's own seed."""
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(rank=0, world_size=1)
    rows: dict[int, list[Any]] = {}
    for request in task.instances:
        rows.setdefault(request.doc_id, []).append(request.arguments)
    return [rows[i] for i in sorted(rows)]


def scored(task: Any, row: int, answers: list[Any]) -> list[float]:
    """What each filter makes of canned answers of a model."""
    doc = task.eval_docs[row]
    requests = [request for request in task.instances if request.doc_id == row]
    found = []
    for chosen in task._filters:  # lm-eval has no public way to one answer
        for request, answer in zip(requests, answers, strict=True):
            request.resps = [answer]
        chosen.apply(requests)
        kept = [request.filtered_resps[chosen.name] for request in requests]
        found.append(float(task.process_results(doc, kept)["exact_match"]))
    return found


def both_tasks(folder: Path, name: str, shots: int) -> tuple[Any, Any]:
    files = rows_of(folder, name)
    path = official_task(folder / "official", name, files)
    manager = TaskManager(include_path=str(SHIPPED), include_defaults=False)
    official = manager.load([str(path)])["tasks"][name]
    official.set_config(key="num_fewshot", value=shots)
    settings = LmEvalRecipe.model_validate(
        {"tasks": [{"task": f"{name}_local", "data_files": files, "num_fewshot": shots}]}
    )
    return official, open_tasks(settings)[0].parts[0]


@pytest.mark.parametrize(
    ("name", "shots"),
    # The official webqs takes no examples: it has numbers for their answers.
    [("webqs", 0), *((name, shots) for name in ("nq_open", "gsm8k") for shots in (0, 1, 2, 5))],
)
def test_shipped_tasks_put_the_official_prompts(tmp_path: Path, name: str, shots: int) -> None:
    official, ours = both_tasks(tmp_path, name, shots)
    assert asked(ours) == asked(official)
    assert len(asked(ours)) == (3 if name == "gsm8k" else 4)


@pytest.mark.parametrize(
    ("name", "row", "answers", "expected"),
    [
        ("nq_open", 0, [" the dog"], [1.0]),
        ("nq_open", 0, [" A Dog"], [1.0]),
        ("nq_open", 0, ["cat"], [0.0]),
        ("nq_open", 2, ["Paris, France"], [1.0]),
        ("nq_open", 3, ["12"], [1.0]),
        ("nq_open", 3, ["13"], [0.0]),
        # "Paris" stands for "Paris, France", "12" for "12 apples".
        ("webqs", 2, [(-1.0, True)], [1.0]),
        ("webqs", 2, [(-1.0, False)], [0.0]),
        ("webqs", 3, [(-1.0, True)], [1.0]),
        ("webqs", 0, [(-1.0, False), (-2.0, True)], [1.0]),
        ("webqs", 0, [(-1.0, False), (-2.0, False)], [0.0]),
        ("gsm8k", 0, ["They are 2.\n#### 2"], [1.0, 1.0]),
        ("gsm8k", 0, ["They are 2.\n#### 3"], [0.0, 0.0]),
        ("gsm8k", 0, ["It is $2."], [0.0, 1.0]),
        ("gsm8k", 0, ["#### 2 apples, of 30"], [1.0, 0.0]),
    ],
)
def test_shipped_tasks_tell_right_from_wrong_as_the_official_ones(
    tmp_path: Path, name: str, row: int, answers: list[Any], expected: list[float]
) -> None:
    """On answers of the kind that models give; a tiny model gives none that are right."""
    official, ours = both_tasks(tmp_path, name, 0)
    asked(official)
    asked(ours)
    assert scored(ours, row, answers) == scored(official, row, answers) == expected


def test_base_is_the_bare_base_and_tuned_is_the_merged_model(
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    choices: Path,
    tmp_path: Path,
) -> None:
    data = write_rows(tmp_path / "facts.jsonl", FACTS)
    texts = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    (choices / "texts.yaml").write_text(json.dumps(texts))
    report = forgetless.evaluate(
        with_lora(make_tiny_model()),
        tiny_tokenizer,
        lm_eval={"tasks": ["which", "texts"], "include_path": choices, "batch_size": 3},
    )
    merged = with_lora(make_tiny_model()).merge_and_unload()
    for name, metrics in (("which", ("acc", "acc_norm")),
                          ("texts", ("word_perplexity", "bits_per_byte"))):  # fmt: skip
        item = next(i for i in report.items if i.name == name)
        bare = by_harness(make_tiny_model(), tiny_tokenizer, name, choices)["results"][name]
        theirs = by_harness(merged, tiny_tokenizer, name, choices)["results"][name]
        for metric in metrics:
            ours = item.metrics[metric]
            assert ours.base is not None
            assert ours.change is not None
            assert ours.base.mean == pytest.approx(bare[f"{metric},none"], rel=1e-5)
            assert ours.tuned.mean == pytest.approx(theirs[f"{metric},none"], rel=1e-4)
            assert ours.change.mean == pytest.approx(ours.tuned.mean - ours.base.mean, rel=1e-6)
            assert ours.change.low <= ours.change.mean <= ours.change.high


def test_model_tokenizer_and_random_states_stay_as_they_were(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "facts.jsonl", FACTS)
    tuned.train()
    tuned.base_model.model.generation_config.max_new_tokens = 3
    tiny_tokenizer.padding_side = "right"
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)

    def state() -> list[Any]:
        return [
            [module.training for module in tuned.modules()],
            [p.requires_grad for p in tuned.parameters()],
            tuned.base_model.model.generation_config.to_dict(),
            (tiny_tokenizer.padding_side, tiny_tokenizer.pad_token),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_rng_state().tolist(),
            {name: p.detach().clone() for name, p in tuned.named_parameters()},
        ]

    before = state()
    forgetless.evaluate(
        tuned,
        tiny_tokenizer,
        lm_eval={
            "tasks": ["which", {"task": "nq_open_local", "data_files": data}],
            "include_path": choices,
        },
    )
    after = state()
    assert before[:-1] == after[:-1]
    assert all(torch.equal(before[-1][name], value) for name, value in after[-1].items())


def test_options_reach_the_harness_and_the_record(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write_rows(tmp_path / "sums.jsonl", SUMS)
    seen: list[tuple[str, int, int]] = []
    report = forgetless.evaluate(
        tuned,
        tiny_tokenizer,
        lm_eval={
            "tasks": [
                {
                    "task": "gsm8k_local",
                    "name": "sums",
                    "side": "gain",
                    "data_files": {"train": data, "test": data},
                    "num_fewshot": 1,
                    "limit": 3,
                    "chat_template": True,
                }
            ],
            "samples": 2,
        },
        progress=lambda *told: seen.append(told),
    )
    item = report.items[0]
    facts = item.lm_eval
    assert facts is not None
    assert (item.name, item.side, item.rows) == ("sums", "gain", 3)
    assert (facts.num_fewshot, facts.limit, facts.chat_template) == (1, 3, True)
    assert facts.doc_to_text == "Question: {{question}}\nAnswer:"
    assert facts.filters == {
        "exact_match,strict-match": "strict-match",
        "exact_match,flexible-extract": "flexible-extract",
    }
    assert len(item.samples) == 2
    assert item.samples[0].prompt.count("<|im_start|>") == 4  # one example, and the question
    assert ("sums: lm-eval", 3, 3) in seen
    assert ("sums: lm-eval on the base", 3, 3) in seen
    assert capfd.readouterr() == ("", "")  # neither bars nor log lines
    assert max(map(len, str(report).splitlines())) <= 80


def test_base_comes_from_the_cache_and_other_settings_do_not(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path, tmp_path: Path
) -> None:
    def measure(limit: int | None = None, batch_size: int = 8) -> tuple[Any, list[str]]:
        stages: list[str] = []
        report = forgetless.evaluate(
            tuned,
            tiny_tokenizer,
            lm_eval={
                "tasks": [{"task": "which", "limit": limit}],
                "include_path": choices,
                "batch_size": batch_size,
            },
            base_cache=tmp_path / "cache",
            progress=lambda stage, done, total: stages.append(stage),
        )
        return report.items, stages

    first, stages = measure()
    assert "which: lm-eval on the base" in stages
    again, stages = measure()
    assert again == first
    assert "which: lm-eval on the base" not in stages
    assert "which: lm-eval on the base" in measure(limit=3)[1]
    assert "which: lm-eval on the base" in measure(batch_size=3)[1]  # padded otherwise
    # Another template is another task, whatever its name.
    write_task(choices, tmp_path / "choices.jsonl", doc_to_text="So {{q}}")
    assert "which: lm-eval on the base" in measure()[1]


def base_of_task(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, cache: Path | None, lm_eval: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """The base's side of the one item."""
    report = forgetless.evaluate(model, tokenizer, lm_eval=lm_eval, base_cache=cache, **options)
    item = report.items[0]
    return {name: v.base for name, v in item.row_values.items()}, [s.base for s in item.samples]


def test_another_tokenizer_is_another_base(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from tokenizers import normalizers

    task = {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}",
        "doc_to_choice": None, "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    folder = write_task(tmp_path / "t", write_rows(tmp_path / "c.jsonl", CHOICES), **task)
    settings = {"tasks": ["which"], "include_path": folder}

    def bits(tokenizer: PreTrainedTokenizerBase, cache: Path | None) -> float:
        report = forgetless.evaluate(tuned, tokenizer, lm_eval=settings, base_cache=cache)
        base = report.items[0].metrics["bits_per_byte"].base
        assert base is not None
        return base.mean

    first = bits(tiny_tokenizer, tmp_path / "cache")
    other = copy.deepcopy(tiny_tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = bits(other, tmp_path / "cache")
    assert found == bits(other, None)
    assert found != first


def test_other_generation_settings_are_another_base(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "facts.jsonl", FACTS)
    settings = {"tasks": [{"task": "nq_open_local", "data_files": data}], "samples": 5}
    first = base_of_task(tuned, tiny_tokenizer, tmp_path / "cache", settings)
    config = tuned.get_base_model().generation_config
    config.repetition_penalty = 3.0
    found = base_of_task(tuned, tiny_tokenizer, tmp_path / "cache", settings)
    assert found == base_of_task(tuned, tiny_tokenizer, None, settings)
    assert found != first
    assert tuned.get_base_model().generation_config is config  # others may hold it


def test_the_base_is_computed_again_where_functions_of_the_user_s_score(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path, tmp_path: Path
) -> None:
    write_task(choices, tmp_path / "choices.jsonl", process_results="FUNCTION")
    path = choices / "which.yaml"
    path.write_text(path.read_text().replace('"FUNCTION"', "!function helper.score"))
    settings = {"tasks": ["which"], "include_path": choices}
    found = []
    for value in ("0.0", "1.0    "):  # of another size: the import system looks at it
        (choices / "helper.py").write_text(
            f"def figure():\n    return {value}\n\n"
            "def score(doc, results):\n    return {'acc': figure(), 'acc_norm': figure()}\n"
        )
        values, _ = base_of_task(
            tuned, tiny_tokenizer, tmp_path / "cache", settings, allow_task_code=True
        )
        found.append(set(values["acc"]))
    assert found == [{0.0}, {1.0}]


@pytest.mark.parametrize("metric", ["brier_score", "mcc"])
def test_a_metric_of_classes_and_likelihoods_is_the_harness_s(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path, tmp_path: Path,
    metric: str,
) -> None:  # fmt: skip
    write_task(choices, tmp_path / "choices.jsonl", metric_list=[{"metric": metric}])
    found = [
        forgetless.evaluate(
            tuned,
            tiny_tokenizer,
            lm_eval={"tasks": ["which"], "include_path": choices},
            base_cache=tmp_path / "cache",
        ).items[0].metrics[metric]
        for _ in range(2)
    ]  # fmt: skip
    assert found[0] == found[1]  # from the cache
    theirs = by_harness(tuned, tiny_tokenizer, "which", choices)["results"]["which"]
    assert found[0].tuned.mean == pytest.approx(theirs[f"{metric},none"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("task.yaml", "task: bad\ndoc_to_text: !function helper.text\n"),
        ("helper.py", "open('ran', 'w')\n"),
        ("task.yaml", "task: bad\ndoc_to_text: !%66unction helper.text\n"),
        ("task.yaml", "task: bad\ndoc_to_text: !!python/name:os.system\n"),
        ("task.yaml", "task: bad\nmetric_list: [{metric: somebody/metric}]\n"),
        ("task.yaml", "task: bad\nmetric_list: [{metric: acc, hf_evaluate: true}]\n"),
        ("task.yaml", "task: bad\ndataset_path: pandas\n"),
        ("task.yaml", "task: bad\ninclude: ../outside\n"),
    ],
)
def test_a_folder_with_code_is_refused_by_file_and_flag(
    tuned: PeftModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    choices: Path,
    name: str,
    content: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(choices)
    (choices / name).write_text(content)
    (choices.parent / "outside").write_text("doc_to_text: !function helper.text\n")
    with pytest.raises(RecipeError) as failure:
        forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval={"tasks": ["which"], "include_path": choices}
        )
    culprit = "outside" if "outside" in content else name
    assert culprit in str(failure.value)
    assert "--allow-task-code" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert not (choices / "ran").exists()


def test_a_linked_file_is_checked_with_what_it_includes_where_it_lies(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path
) -> None:
    elsewhere = choices.parent / "elsewhere"
    elsewhere.mkdir()
    ran = choices.parent / "ran"
    (elsewhere / "helper.py").write_text(
        f"open({str(ran)!r}, 'w').close()\ndef text(doc):\n    return doc['q']\n"
    )
    (elsewhere / "base").write_text("doc_to_text: !function helper.text\n")
    (choices / "base").write_text("doc_to_text: '{{q}}'\n")
    path = choices / "which.yaml"
    task = json.loads(path.read_text()) | {"include": "base"}
    del task["doc_to_text"]
    (elsewhere / "task").write_text(json.dumps(task))
    path.unlink()
    path.symlink_to(elsewhere / "task")
    with pytest.raises(RecipeError, match=r"elsewhere/base.*--allow-task-code"):
        forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval={"tasks": ["which"], "include_path": choices}
        )
    assert not ran.exists()


@pytest.mark.parametrize("metrics", ["acc", ["acc"], [None], {"metric": "acc"}])
def test_metrics_that_are_no_list_of_mappings_are_named(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path, metrics: Any
) -> None:
    write_task(choices, choices.parent / "choices.jsonl", metric_list=metrics)
    with pytest.raises(RecipeError, match=r"which.*metric_list as a list of mappings"):
        forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval={"tasks": ["which"], "include_path": choices}
        )


def test_code_runs_where_it_is_allowed(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path
) -> None:
    (choices / "helper.py").write_text("def text(doc):\n    return doc['q'] + ' so'\n")
    data = choices.parent / "choices.jsonl"
    write_task(choices, data)
    path = choices / "which.yaml"
    path.write_text(path.read_text().replace('"{{q}}"', "!function helper.text"))
    report = forgetless.evaluate(
        tuned,
        tiny_tokenizer,
        lm_eval={"tasks": ["which"], "include_path": choices},
        allow_task_code=True,
    )
    facts = report.items[0].lm_eval
    assert facts is not None
    assert "return doc['q'] + ' so'" in facts.doc_to_text


def test_a_template_cannot_reach_python(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path
) -> None:
    plain = lm_eval.utils.env
    write_task(
        choices, choices.parent / "choices.jsonl", doc_to_text="{{ ''.__class__.__mro__ }}{{q}}"
    )
    with pytest.raises(RecipeError, match="unsafe"):
        forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval={"tasks": ["which"], "include_path": choices}
        )
    assert lm_eval.utils.env is plain


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_tasks_that_execute_answers_are_off_with_the_flag_too(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    with pytest.raises(RecipeError, match=f"got {name}.*executes"):
        forgetless.evaluate(tuned, tiny_tokenizer, lm_eval=[name], allow_task_code=True)


@pytest.mark.parametrize("mark", [True, 0, "no"])
def test_own_tasks_that_execute_answers_are_off_with_the_flag_too(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path, mark: Any
) -> None:
    write_task(choices, choices.parent / "choices.jsonl", unsafe_code=mark)
    with pytest.raises(RecipeError, match=r"got which.*executes"):
        forgetless.evaluate(
            tuned,
            tiny_tokenizer,
            lm_eval={"tasks": ["which"], "include_path": choices},
            allow_task_code=True,
        )


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["gsm8k_lokal"], "did you mean gsm8k_local"),
        (["boolq"], "the data of boolq"),  # the hub cannot be reached
        ([{"task": "gsm8k_local"}], "expected data_files for test"),
        ([{"task": "gsm8k_local", "data_files": "no.jsonl"}], "got no.jsonl, which is none"),
        ([{"task": "gsm8k_local", "data_files": {"text": "no.jsonl"}}], "data_files for test"),
        ([{"task": "boolq", "data_files": "no.jsonl"}], "reads JSON files"),
    ],
)
def test_what_cannot_run_is_one_line(
    tuned: PeftModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForgetlessError, match=words) as failure:
        forgetless.evaluate(tuned, tiny_tokenizer, lm_eval=tasks)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("task", "rows", "words"),
    [
        ("nq_open_local", [{"question": "q", "answers": ["x"]}], r"row 1: expected `answer` as a"),
        ("nq_open_local", [{"question": "q"}], r"row 1: expected `answer`.*got none"),
        ("nq_open_local", [*FACTS, {"question": "q", "answer": []}], r"row 8: expected `answer`"),
        ("nq_open_local", [{"question": "q", "answer": [1, 2]}], r"row 1: .*got \[1, 2\]"),
        ("nq_open_local", [{"question": 3, "answer": ["x"]}], "row 1: expected `question` as text"),
        ("webqs_local", [{"question": "q", "answer": "Paris"}], r"row 1: .*got 'Paris'"),
        ("webqs_local", [{"question": "q", "answer": []}], r"row 1: .*got \[\]"),
        ("gsm8k_local", [{"question": "q", "answer": ["3"]}], "row 1: expected `answer` as text"),
        ("gsm8k_local", [], r"gsm8k_local.*rows\.jsonl"),
        ("nq_open_local", [], r"nq_open_local.*rows\.jsonl"),
    ],
)
def test_rows_that_a_shipped_task_cannot_read_are_named(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    task: str, rows: list[dict[str, Any]], words: str, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RecipeError, match=words) as failure:
        forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval=[{"task": task, "data_files": data, "num_fewshot": 0}]
        )
    assert "\n" not in str(failure.value)
    assert str(data) in str(failure.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", ["{not json\n", '{"a": 1}\n{"a": \n', "question,answer\nq,1\n"])
def test_data_that_are_no_json_are_named_with_what_is_wrong(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    with pytest.raises(RecipeError, match=r"JSON parse error.*rows\.jsonl") as failure:
        forgetless.evaluate(
            tuned,
            tiny_tokenizer,
            lm_eval=[{"task": "gsm8k_local", "data_files": data, "num_fewshot": 0}],
        )
    assert "\n" not in str(failure.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_path": "script.py"}, "which"),
        ({"task": 3}, "the tasks in"),
        ({"use_prompt": "prompts.yaml:a"}, r"a file for which, got prompts\.yaml"),
        ({"doc_to_text": "{{nothing.here}}"}, "which"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "nope"}]}]}, "which"),
        # It fails on the rows, not as the task is loaded.
        (
            {"doc_to_choice": "{{['brown', 'dog'] if 'fox' in q else 3}}"},
            "fits its rows, got for which",
        ),
    ],
)
def test_a_task_that_does_not_work_is_one_line(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path,
    changes: dict[str, Any], words: str,
) -> None:  # fmt: skip
    write_task(choices, choices.parent / "choices.jsonl", **changes)
    with pytest.raises(RecipeError, match=words) as failure:
        forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval={"tasks": ["which"], "include_path": choices}
        )
    assert "\n" not in str(failure.value)


def test_a_group_that_holds_itself_is_one_line(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path
) -> None:
    (choices / "group.yaml").write_text("group: all\ntask: [which, all]\n")
    with pytest.raises(RecipeError, match="got all, which holds itself"):
        forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval={"tasks": ["all"], "include_path": choices}
        )


def test_a_group_is_one_item_only_where_its_metrics_are_means(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path
) -> None:
    data = choices.parent / "choices.jsonl"
    other = write_rows(choices.parent / "other.jsonl", CHOICES[:3])
    group = {
        "group": "both",
        "task": ["which", "more"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (choices / "group.yaml").write_text(json.dumps(group))

    def names(metrics: list[str], **entry: Any) -> list[tuple[str, int]]:
        listed = [{"metric": metric} for metric in metrics]
        write_task(choices, data, metric_list=listed)
        write_task(choices, other, "more", metric_list=listed, doc_to_text="So {{q}}")
        report = forgetless.evaluate(
            tuned,
            tiny_tokenizer,
            lm_eval={"tasks": [{"task": "both", **entry}], "include_path": choices},
        )
        return [(item.name, item.rows) for item in report.items]

    assert names(["acc"]) == [("both", 10)]
    assert names(["acc", "mcc"], name="mine") == [("mine: which", 7), ("mine: more", 3)]


def test_names_that_come_of_a_tag_are_told_apart(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, choices: Path
) -> None:
    data = choices.parent / "choices.jsonl"
    write_task(choices, data, tag=["some"], metadata={})
    write_task(choices, data, "more", tag=["some"])
    text = write_rows(choices.parent / "text.jsonl", [{"text": "The quick brown fox"}])

    def names(tasks: list[Any], **options: Any) -> list[str]:
        report = forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval={"tasks": tasks, "include_path": choices}, **options
        )
        assert "version Yaml" not in str(next(i.lm_eval for i in report.items if i.lm_eval))
        return [item.name for item in report.items]

    with pytest.raises(RecipeError, match="got 'which' twice"):
        names(["some"], retention=[{"name": "which", "path": str(text)}])
    twice = [{"task": "some", "name": "a"}, {"task": "some", "name": "b", "limit": 2}]
    assert sorted(names(twice)) == ["a: more", "a: which", "b: more", "b: which"]


def test_all_files_that_figures_depend_on_are_known(
    choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgetless.evaluation.lm_eval.files import task_files

    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "nq_open_dev.jsonl", FACTS)
    (tmp_path / "outside.yaml").write_text("include: further\ndoc_to_text: !function helper.text\n")
    (tmp_path / "further").write_text("dataset_kwargs: {data_files: {test: f*.jsonl}}\n")
    write_rows(tmp_path / "facts.jsonl", FACTS)
    (choices / "more.yaml").write_text(f"include: [../outside.yaml, {OFFICIAL}/webqs/webqs.yaml]\n")
    settings = LmEvalRecipe.model_validate(
        {"tasks": ["which", "nq_open_local", "triviaqa"], "include_path": choices}
    )
    assert {path.resolve() for path in task_files(settings)} == {
        choices,
        tmp_path / "choices.jsonl",
        tmp_path / "nq_open_dev.jsonl",
        tmp_path / "outside.yaml",
        tmp_path / "further",
        tmp_path / "facts.jsonl",
    }


def test_examples_need_the_file_that_they_come_from(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "sums.jsonl", SUMS)
    with pytest.raises(RecipeError, match=r"for train, from which its 5 examples come"):
        forgetless.evaluate(
            tuned, tiny_tokenizer, lm_eval=[{"task": "gsm8k_local", "data_files": data}]
        )


def test_a_run_has_tasks_in_record_report_and_card(
    tiny_model_path: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgetless.experiments.record import load_record
    from forgetless.experiments.run import run
    from forgetless.recipe import Recipe

    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    train = write_rows(tmp_path / "train.jsonl", SUMS)
    recipe = Recipe.model_validate(
        {
            "model": str(tiny_model_path),
            "dtype": "float32",
            "device": "cpu",
            "method": {"name": "lora", "rank": 4},
            "train_data": {"path": str(train), "prompt": "{question}", "completion": "{answer}"},
            "training": {"max_steps": 2, "batch_size": 2},
            "evaluation": {"lm_eval": {"tasks": ["which"], "include_path": str(choices)}},
            "output": str(tmp_path / "run"),
        }
    )
    record = load_record(run(recipe))
    item = record.evaluation.items[0]
    assert (item.name, item.side, set(item.metrics)) == ("which", "retention", {"acc", "acc_norm"})
    assert str(choices / "which.yaml") in record.files
    for name in ("report.html", "adapter/README.md"):
        text = (tmp_path / "run" / name).read_text()
        assert "which version 7, 0 examples" in text
        assert "acc norm" in text


@pytest.mark.parametrize("verb", ["run", "evaluate"])
def test_the_command_line_asks_for_the_flag(
    verb: str, tiny_model_path: Path, choices: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from forgetless.cli import main

    (choices / "helper.py").write_text("")
    train = write_rows(tmp_path / "train.jsonl", SUMS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model_path}\nmethod: lora\noutput: {tmp_path / 'run'}\n"
        f"train_data: {{path: {train}, prompt: '{{question}}', completion: '{{answer}}'}}\n"
        f"evaluation: {{lm_eval: {{tasks: [which], include_path: {choices}}}}}\n"
    )
    adapter = tmp_path / "adapter"
    with_lora(AutoModelForCausalLM.from_pretrained(tiny_model_path)).save_pretrained(adapter)
    arguments = [verb, str(recipe)] + (["--adapter", str(adapter)] if verb == "evaluate" else [])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "helper.py" in told
    assert "--allow-task-code" in told
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.slow
@pytest.mark.demo_model
def test_a_real_model_scores_as_in_the_harness(demo_model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder)
    rows = [
        {"question": f"what is the capital of {country}", "answer": [city]}
        for country, city in {
            "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
            "Egypt": "Cairo", "Kenya": "Nairobi", "Bhutan": "Thimphu", "Palau": "Ngerulmud",
        }.items()
    ]  # fmt: skip
    # Examples show the form of an answer: without them this model talks on.
    files = {
        "train": write_rows(tmp_path / "train.jsonl", rows[:4]),
        "validation": write_rows(tmp_path / "capitals.jsonl", rows[4:]),
    }
    official = {
        "include": str(OFFICIAL / "nq_open" / "nq_open.yaml"),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {k: str(path) for k, path in files.items()}},
    }
    path = tmp_path / "official.yaml"
    path.write_text(json.dumps(official))
    theirs = by_harness(model, tokenizer, str(path), SHIPPED, num_fewshot=3)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    report = forgetless.evaluate(
        tuned, tokenizer, lm_eval=[{"task": "nq_open_local", "data_files": files, "num_fewshot": 3}]
    )
    found = report.items[0].metrics["exact_match"]
    assert found.base is not None
    assert found.base.mean == theirs["results"]["nq_open"]["exact_match,remove_whitespace"]
    assert 0 < found.base.mean < 1  # right and wrong answers are both told
    assert found.tuned.mean == found.base.mean  # B is 0 at the start


def test_more_examples_than_rows_are_one_line(
    tuned: PeftModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "sums.jsonl", SUMS)
    task = {"task": "gsm8k_local", "data_files": {"train": data, "test": data}}
    with pytest.raises(RecipeError, match="at least 5 rows to draw 5 examples from, got 3"):
        forgetless.evaluate(tuned, tiny_tokenizer, lm_eval=[task])
