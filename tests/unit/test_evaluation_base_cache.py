"""The base's figures on disk: used when everything matches, computed again otherwise."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_setup import GAIN, with_lora

from forgetless.data.tokens import TokenRow
from forgetless.errors import ForgetlessWarning
from forgetless.evaluation.base_cache import BaseCache, TaskFigures
from forgetless.evaluation.evaluate import evaluate
from forgetless.evaluation.generation import Generated
from forgetless.evaluation.likelihood import RowScores

ROWS = [TokenRow((1, 2, 3), 1), TokenRow((4, 5), 0)]
SCORES = RowScores(np.array([0.1 + 0.2, 1e-17]), np.array([2, 1]), np.array([True, False]))


class Counted:
    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def test_scores_come_back_bit_for_bit(tmp_path):
    BaseCache(tmp_path, ["model"]).scores(ROWS, lambda: SCORES)
    compute = Counted(None)

    found = BaseCache(tmp_path, ["model"]).scores(ROWS, compute)

    assert compute.calls == 0
    assert found.nll_sum.tolist() == SCORES.nll_sum.tolist()
    assert found.num_tokens.tolist() == [2, 1]
    assert found.greedy_match.tolist() == [True, False]


def test_texts_come_back_as_they_were(tmp_path):
    texts = ["line\nbreak", "</script> “é” \u2028"]
    cache = BaseCache(tmp_path, ["model"])
    generated = Generated(texts, [True, False])
    cache.generated([(1, 2), (3,)], 8, [2], lambda: generated)
    assert cache.generated([(1, 2), (3,)], 8, [2], Counted(None)) == generated


def test_figures_of_anything_else_are_never_used(tmp_path):
    BaseCache(tmp_path, ["model"]).scores(ROWS, lambda: SCORES)
    others = [
        ("other model", ROWS),
        ("model", [TokenRow((1, 2, 3), 2), ROWS[1]]),
        ("model", [TokenRow((1, 2, 4), 1), ROWS[1]]),
        ("model", ROWS[:1]),
        ("model", ROWS[::-1]),
    ]
    for context, rows in others:
        compute = Counted(SCORES)
        BaseCache(tmp_path, [context]).scores(rows, compute)
        assert compute.calls == 1

    cache = BaseCache(tmp_path, ["model"])
    for prompts, limit, ends in [
        ([(1, 2)], 8, [2]),
        ([(1, 2)], 9, [2]),
        ([(1, 2)], 8, [2, 3]),
        ([(1,), (2,)], 8, [2]),
    ]:
        compute = Counted(Generated(["x"] * len(prompts), [False] * len(prompts)))
        cache.generated(prompts, limit, ends, compute)
        assert compute.calls == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"num_tokens":[2,1]', '"num_tokens":[2]'),
        lambda text: text.replace('"schema_version":1', '"schema_version":2'),
        lambda text: "[]",
    ],
)
def test_damaged_file_is_computed_again_with_a_warning(tmp_path, damage):
    cache = BaseCache(tmp_path, ["model"])
    cache.scores(ROWS, lambda: SCORES)
    path = next(tmp_path.glob("base-*.json"))
    whole = path.read_text()
    path.write_text(damage(whole))
    compute = Counted(SCORES)

    with pytest.warns(ForgetlessWarning, match=path.name):
        cache.scores(ROWS, compute)

    assert compute.calls == 1
    assert path.read_text() == whole


@pytest.mark.skipif(os.name != "posix", reason="a path below a file fails alike only there")
def test_cache_that_cannot_be_written_costs_a_warning_not_the_figures(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(ForgetlessWarning, match="cannot be written"):
        found = BaseCache(blocked / "cache", ["model"]).scores(ROWS, lambda: SCORES)
    assert found.nll_sum.tolist() == SCORES.nll_sum.tolist()
    assert found.greedy_match.tolist() == SCORES.greedy_match.tolist()


def test_without_a_folder_everything_is_computed_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compute = Counted(SCORES)
    cache = BaseCache(None, [])
    cache.scores(ROWS, compute)
    cache.scores(ROWS, compute)
    assert compute.calls == 2
    assert list(Path().iterdir()) == []


def test_cached_base_gives_the_same_report_without_running_it(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    tuned = with_lora(make_tiny_model())
    plain = evaluate(tuned, tiny_tokenizer, gain=[GAIN])
    first = evaluate(tuned, tiny_tokenizer, gain=[GAIN], base_cache=tmp_path)
    stages = []

    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgetlessWarning)
        # The tiny model never ends its answers.
        warnings.filterwarnings("ignore", message=".*max_new_tokens")
        second = evaluate(
            with_lora(make_tiny_model()), tiny_tokenizer, gain=[GAIN], base_cache=tmp_path,
            progress=lambda stage, done, total: stages.append(stage),
        )  # fmt: skip

    assert plain.items == first.items == second.items
    assert stages
    assert not any("base" in stage for stage in stages)


def test_base_of_another_model_is_not_taken_from_the_cache(
    make_tiny_model, tiny_tokenizer, tmp_path
):
    evaluate(with_lora(make_tiny_model()), tiny_tokenizer, gain=[GAIN], base_cache=tmp_path)
    other = with_lora(make_tiny_model(seed=1))
    cached = evaluate(other, tiny_tokenizer, gain=[GAIN], base_cache=tmp_path)
    assert cached.items == evaluate(other, tiny_tokenizer, gain=[GAIN]).items


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), {1: 2.0}, {"x"}, (1.0, "a")])
def test_figures_of_tasks_that_json_cannot_hold_are_not_kept(tmp_path: Path, value: Any) -> None:
    cache = BaseCache(tmp_path, ["model"])
    figures = TaskFigures(values={"x,none": [value, 1.0]}, answers=["", ""])
    assert cache.task(["key"], 2, lambda: figures) is figures
    assert [p for p in tmp_path.iterdir() if p.suffix != ".lock"] == []
    kept = TaskFigures(values={"x,none": [[1, -2.5], 1.0]}, answers=["", ""])
    assert cache.task(["key"], 2, lambda: kept) is kept
    assert cache.task(["key"], 2, lambda: figures) == kept
