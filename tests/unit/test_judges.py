"""Judges of the user's own: what they are given, what is made of it, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_setup import GAIN, QUESTIONS, with_lora

from forgetless.errors import DataError, RecipeError
from forgetless.evaluation.evaluate import evaluate
from forgetless.evaluation.results import EvaluationReport


@pytest.fixture
def tuned(tiny_model):
    return with_lora(tiny_model)


def measured(model, tokenizer, judges, **changes) -> EvaluationReport:
    return evaluate(model, tokenizer, gain=[{**GAIN, **changes}], movement_data=(), judges=judges)


def test_a_judge_reads_what_was_asked_and_answered_once_for_each_model(tuned, tiny_tokenizer):
    heard = []

    def length(prompts, answers, references):
        heard.append((prompts, answers, references))
        return [len(answer) for answer in answers]

    report = measured(tuned, tiny_tokenizer, {"length": length})
    assert len(heard) == 2
    prompts = [f"Question: {row['question']}\nAnswer:" for row in QUESTIONS]
    references = [row["answer"].strip() for row in QUESTIONS]
    for asked, _, expected in heard:
        assert asked == prompts
        assert [one.strip() for one in expected] == references
    shown = report.items[0].samples
    assert [sample.base for sample in shown] == heard[0][1][: len(shown)]
    assert [sample.tuned for sample in shown] == heard[1][1][: len(shown)]

    lengths = [[len(answer) for answer in answers] for _, answers, _ in heard]
    result = report.items[0].metrics["length"]
    assert result.higher_is_better
    assert result.base.mean == np.mean(lengths[0])
    assert result.tuned.mean == np.mean(lengths[1])
    assert result.change.mean == pytest.approx(np.mean(lengths[1]) - np.mean(lengths[0]))
    assert report.items[0].row_values["length"].tuned == tuple(map(float, lengths[1]))
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    assert "length" in str(report)


def test_shares_stay_shares_and_arrays_are_taken(tuned, tiny_tokenizer):
    report = measured(
        tuned, tiny_tokenizer, {"even": lambda p, a, r: np.arange(len(a), dtype=np.float32) % 2}
    )
    result = report.items[0].metrics["even"]
    assert (result.base.mean, result.change.mean) == (0.5, 0)
    assert 0 <= result.base.low <= result.base.high <= 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda p, a, r: [1.0], "expected one number for each of 6 answers, got 1"),
        (lambda p, a, r: None, "expected a list of 6 numbers, got None"),
        (lambda p, a, r: 0.5, "expected a list of 6 numbers, got 0.5"),
        (lambda p, a, r: np.array(0.5), "expected a list of 6 numbers"),
        (lambda p, a, r: torch.ones(6).mean(), "expected a list of 6 numbers"),
        (lambda p, a, r: {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}, "expected a list of 6 numbers"),
        (lambda p, a, r: [10**400] * 6, "expected numbers, got 1"),
        (lambda p, a, r: np.ones((6, 2)), "expected numbers, got array"),
        (lambda p, a, r: "111111", "expected a list of 6 numbers"),
        (lambda p, a, r: ["good"] * 6, "expected numbers, got 'good' for answer 0"),
        (lambda p, a, r: ["1"] * 6, "expected numbers, got '1' for answer 0"),
        (lambda p, a, r: [0.0, float("nan")] * 3, "expected finite numbers, got nan for answer 1"),
    ],
)
def test_what_is_no_figure_for_every_answer_is_refused(tuned, tiny_tokenizer, answer, words):
    with pytest.raises(DataError, match=words) as raised:
        measured(tuned, tiny_tokenizer, {"mine": answer})
    assert "`apples`: judge 'mine'" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("judges", "words"),
    [
        ({"refusal": len}, "expected another name than a metric's, got 'refusal'"),
        ({"mine": "harmful?"}, "judges.mine: expected a function of prompts, answers and refer"),
        (len, 'expected functions by name, {"name": function}, got'),
        ([len], 'expected functions by name, {"name": function}, got'),
        ({"": len}, "expected names of up to 40 letters"),
        ({"two\nlines": len}, "expected names of up to 40 letters"),
    ],
)
def test_what_is_no_judge_is_refused_before_anything_is_measured(
    tuned, tiny_tokenizer, judges, words
):
    with pytest.raises(RecipeError, match=words):
        measured(tuned, tiny_tokenizer, judges)


def test_a_judge_of_nothing_is_refused(tuned, tiny_tokenizer):
    with pytest.raises(RecipeError, match="expected an item whose answers are generated for mine"):
        measured(tuned, tiny_tokenizer, {"mine": len}, metrics=["nll"])


def test_what_a_judge_raises_is_its_own(tuned, tiny_tokenizer):
    def broken(prompts, answers, references):
        raise ConnectionError("no judge at home")

    with pytest.raises(ConnectionError, match="no judge at home"):
        measured(tuned, tiny_tokenizer, {"mine": broken})


def test_what_is_raised_while_its_figures_are_read_is_the_judges_own_too(tuned, tiny_tokenizer):
    def broken(prompts, answers, references):
        yield 1.0
        raise TypeError("no judge at home")

    with pytest.raises(TypeError, match="no judge at home"):
        measured(tuned, tiny_tokenizer, {"mine": broken})
