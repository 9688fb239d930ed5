"""`evaluation.lm_eval` in a recipe, and its metrics, without lm-eval itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetless.data.validation import validated
from forgetless.errors import RecipeError
from forgetless.evaluation.lm_eval.metrics import measured_metric
from forgetless.evaluation.lm_eval.spec import parse_lm_eval
from forgetless.evaluation.results import ItemResult
from forgetless.experiments.numbers import is_share, metric_name
from forgetless.recipe import EvaluationRecipe, json_schema


def test_a_list_of_names_is_retention_with_the_defaults() -> None:
    found = EvaluationRecipe.model_validate({"lm_eval": ["triviaqa", "gsm8k"]}).lm_eval
    assert found is not None
    assert [(t.task, t.side, t.num_fewshot, t.limit) for t in found.tasks] == [
        ("triviaqa", "retention", None, None),
        ("gsm8k", "retention", None, None),
    ]
    assert found == parse_lm_eval({"tasks": ["triviaqa", {"task": "gsm8k"}]})


def test_what_was_resolved_loads_as_the_same() -> None:
    tree = {"lm_eval": [{"task": "gsm8k_local", "side": "gain", "data_files": {"test": "a.jsonl"}}]}
    made = EvaluationRecipe.model_validate(tree)
    assert EvaluationRecipe.model_validate(made.model_dump(mode="json")) == made
    assert made.measures


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("gsm8k", "expected a list of tasks"),
        ([{"task": "gsm8k", "shots": 3}], "unknown key `shots`"),
        ([{"task": "gsm8k", "side": "both"}], "side: expected"),
        (["gsm8k", "gsm8k"], "'gsm8k' twice"),
        ({"include_path": "tasks"}, "expected a key `tasks`"),
    ],
)
def test_a_mistake_is_named_with_its_key(value: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as failure:
        validated(EvaluationRecipe, {"lm_eval": value})
    assert str(failure.value).startswith("evaluation.lm_eval")


def test_a_task_needs_a_name_apart_from_the_items() -> None:
    with pytest.raises(RecipeError, match="'kept' in both"):
        validated(
            EvaluationRecipe,
            {"retention": [{"name": "kept", "path": "a.jsonl"}],
             "lm_eval": [{"task": "gsm8k", "name": "kept"}]}
        )  # fmt: skip


def test_schema_and_old_records_know_of_tasks() -> None:
    assert "LmEvalTask" in json_schema()["$defs"]
    old = ItemResult(name="a", side="gain", rows=1, truncated_rows=0, metrics={}).model_dump()
    del old["lm_eval"]
    assert ItemResult.model_validate(old).lm_eval is None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_share_has_the_intervals_of_shares() -> None:
    from forgetless.evaluation.intervals import paired_change

    base, tuned = [1.0] * 20 + [0.0] * 20, [1.0] * 12 + [0.0] * 28
    found = measured_metric("acc,none", base, tuned, mean, higher_is_better=True)
    assert found is not None
    change = found.result.change
    assert change is not None
    assert (change.low, change.high) == paired_change(0, 8, 40)
    assert is_share("acc")


def test_a_perplexity_is_the_harness_s_and_its_interval_follows_the_rate() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 40, 60).astype(float)
    base = [[-2.0 * n + draw.normal(), n] for n in lengths]
    tuned = [[x - 0.1 * n, n] for x, n in base]

    def perplexity(items: list[Any]) -> float:
        return math.exp(-sum(x for x, _ in items) / sum(n for _, n in items))

    found = measured_metric("word_perplexity", base, tuned, perplexity, higher_is_better=False)
    assert found is not None
    result = found.result
    assert result.base is not None
    assert result.change is not None
    assert result.base.mean == pytest.approx(perplexity(base))
    assert result.tuned.mean == pytest.approx(perplexity(tuned))
    # Each row worsens by 0.1 a word: the paired change has no spread, the levels have.
    assert result.change.low == pytest.approx(result.change.high)
    assert result.change.mean == pytest.approx(perplexity(tuned) - perplexity(base))
    assert result.base.high - result.base.low > 0.01


def test_another_function_of_all_rows_is_resampled_in_pairs() -> None:
    draw = np.random.default_rng(0)
    gold = draw.integers(0, 2, 80).astype(float)
    right = [[g, g] for g in gold]
    wrong = [[g, 1 - g if i % 4 == 0 else g] for i, g in enumerate(gold)]

    def correlation(items: list[Any]) -> float:
        a, b = np.array(items).T
        return float(np.corrcoef(a, b)[0, 1])

    found = measured_metric("mcc", right, wrong, correlation, higher_is_better=True)
    assert found is not None
    change = found.result.change
    assert change is not None
    assert change.mean == pytest.approx(correlation(wrong) - 1)
    assert change.low < change.mean < change.high < 0
    same = measured_metric("mcc", wrong, wrong, correlation, higher_is_better=True)
    assert same is not None
    assert same.result.change is not None
    assert same.result.change.low == same.result.change.high == 0


def test_names_do_not_promise_what_a_metric_is_not() -> None:
    f1 = measured_metric("f1", [40.0, 80.0], [50.0, 70.0], mean, higher_is_better=True)
    assert f1 is not None
    assert f1.result.metric == "f1 score"
    assert not is_share("f1 score")
    assert is_share("exact_match,strict-match")
    assert metric_name("exact_match,strict-match") == "exact match, strict-match"
    assert measured_metric("x", ["a"], ["b"], lambda _: "text", higher_is_better=True) is None


def test_a_function_of_all_rows_that_fails_is_no_number() -> None:
    def fails(items: list[Any]) -> float:
        return float(np.eye(2)[[x for x, _ in items]].sum())

    rows = [[0.0, 1.0], [1.0, 1.0]]  # a float is no index
    assert measured_metric("x", rows, rows, fails, higher_is_better=True) is None


def test_shipped_tasks_have_no_code() -> None:
    folder = Path(parse_lm_eval.__code__.co_filename).parent / "local_tasks"
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == [
        "gsm8k_local.yaml", "nq_open_local.yaml", "webqs_local.yaml",
    ]  # fmt: skip
    assert not any("!function" in f.read_text() for f in files)
