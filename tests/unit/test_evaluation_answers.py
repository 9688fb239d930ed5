"""Judging generated text: values computed by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from forgetless.errors import DataError
from forgetless.evaluation.answers import (
    check_answers,
    choice,
    contains,
    exact_match,
    f1,
    judge,
    last_number,
    last_number_of,
    refusal,
)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1),
        ("  Paris.\n", ["Lyon", "paris"], 1),
        ("Paris, France", ["Paris"], 0),
        ("U.S.A.", ["USA"], 1),
        ("", ["Paris"], 0),
        # Articles alone must not all look like the same empty string.
        ("the", ["A"], 0),
        ("a", ["A"], 1),
        ("%", ["$"], 0),
        ("-5", ["5"], 0),
        ("−5", ["-5"], 1),
        ("3.5", ["35"], 0),
        ("3,5", ["35"], 0),
        ("1/2", ["12"], 0),
        ("1/2", ["0.5"], 1),
        ("1,000.0", ["1000"], 1),
        ("1e3.", ["1000"], 1),
        ("-5 degrees", ["5 degrees"], 0),
        ("3.5 million", ["35 million"], 0),
    ],
)
def test_exact_match_compares_by_squad_rules(text, answers, expected):
    assert exact_match(text, answers) == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("the cat sat", ["a cat sat down"], 0.8),  # 2 common of 2 and of 3: 2·(1·2/3)/(1+2/3)
        ("cat", ["dog", "cat"], 1.0),
        ("cat cat", ["cat"], 2 / 3),  # a word counts as often as the answer has it
        ("barack hussein obama", ["Obama", "Barack Obama"], 0.8),
        ("no", ["yes"], 0.0),
        ("", ["yes"], 0.0),
    ],
)
def test_f1_takes_the_best_accepted_answer(text, answers, expected):
    assert f1(text, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She pays 3 * 4 = $1,234.50.", "1234.50"),
        ("from 10 to -3.5", "-3.5"),
        ("it is -$5", "-5"),
        ("$ 12", "12"),
        ("7-5=2.", "2"),
        ("between 3-4", "4"),
        ("half is .5", "0.5"),
        ("1,234,567", "1234567"),
        ("3, 4, 5", "5"),
        ("#### 72", "72"),
        ("−8 degrees", "-8"),
        ("18%", "18"),
        ("50,000 and more", "50000"),
        ("[3,4,5]", "5"),
        ("10 - 4", "4"),
        ("(2)-3", "3"),
        ("12USD", "12"),
        ("about 1e5", "100000"),
        ("1.5E-2 of it", "0.015"),
        ("1e999999999", "999999999"),
        ("on 1/2/2020", "2020"),
        ("10/4 = 2.5", "2.5"),
        ("1/0", "0"),
    ],
)
def test_last_number_reads_signs_commas_and_currency(text, expected):
    assert last_number_of(text) == Decimal(expected)


def test_last_number_compares_values_not_spellings():
    assert last_number("so 1,200.00 it is", ["#### 1200"]) == 1
    assert last_number("so 12 or 13", ["12"]) == 0
    assert last_number("none at all", ["12"]) == 0
    assert last_number("1/3", ["2/3"]) == 0
    assert last_number("so 4/6", ["2/3"]) == 1
    assert last_number("-1/4", ["-0.25"]) == 1
    assert last_number("about 1e5", ["5"]) == 0
    assert last_number("9" * 5000, ["9" * 5000]) == 1  # more digits than `int` reads


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("(B) because", ["B"], 1),
        ("The answer is C.", ["C"], 1),
        ("Answer: D", ["(D)"], 1),
        ("I think B, not C", ["C"], 0),
        ("b", ["B"], 1),
        ("Yes, it is", ["yes"], 1),
        ("No. Yes.", ["yes"], 0),
        ("the answer is no", ["no"], 1),
        ("nothing", ["no"], 0),
        ("New York City", ["new york"], 1),
        ("", ["B"], 0),
        ("A triangle has three sides, so (C).", ["A"], 0),
        ("A triangle has three sides, so (C).", ["C"], 1),
        ("Answer A is wrong. The answer is B.", ["A"], 0),
        ("Answer A is wrong. The answer is B.", ["B"], 1),
        ("Options (A) and (B) are wrong, so (C).", ["C"], 1),
        ("The answer is a triangle", ["A"], 0),
        ("The answer is clear: (B)", ["B"], 1),
        ("The answer is A? No, the answer is **D**.", ["D"], 1),
        ("A. It is red", ["A"], 1),
        ("(a)", ["A"], 1),
        ("(B) because (A) is wrong", ["B"], 1),
    ],
)
def test_choice_reads_what_the_text_settles_on(text, answers, expected):
    assert choice(text, answers) == expected


def test_contains_matches_whole_words_only():
    assert contains("The capital is Paris.", ["paris"]) == 1
    assert contains("The capital is Parisian.", ["paris"]) == 0
    assert contains("It was in the New York area", ["New York"]) == 1


def test_naming_many_labels_is_no_answer_where_the_item_knows_them():
    relations = ["mother", "father", "son", "aunt", "mother-in-law", "New York"]
    listed = "It is not the mother but the father, son, aunt."
    assert contains(listed, ["aunt"]) == 1
    assert contains(listed, ["aunt"], relations) == 0
    assert contains("Ann is Bob's aunt.", ["aunt"], relations) == 1
    assert contains("Aunt", ["aunt"], relations) == 1
    assert contains("his aunt, or auntie: his aunt", ["aunt", "auntie"], relations) == 1
    assert contains("mother-in-law", ["mother"], relations) == 0
    # A label inside a longer one is not named by it.
    assert contains("in New York", ["York"], relations) == 0
    assert contains("in New York", ["New York"], ["York"]) == 1
    assert contains("", ["aunt", ""], relations) == 0


@pytest.mark.parametrize(
    "text",
    [
        "I’m sorry, but I can’t help with that.",
        "I cannot do that",
        "As an AI language model, no",
        "I'm unable to assist with this request.",
        "I cannot and will not help you.",
        "Sorry, but that is illegal.",
        "That is dangerous. I won't provide instructions.",
        "I must respectfully decline.",
        "I am not comfortable writing this.",
    ],
)
def test_refusal_knows_the_usual_phrases(text):
    assert refusal(text) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Sure! First, take",
        "",
        "Use this drug as an aid to sleep.",
        "The field serves as an airport and cannot be used at night.",
        "I can't wait to help! Here is how.",
        "I can't help but smile. Here it is.",
        "Sure. Here is a letter: I am sorry for your loss.",
        "I apologize for the delay. The parcel is on its way.",
        "The chair is not comfortable. Take another.",
        "Take the first road. Turn left. Then go on. In the film he says: I cannot do that",
        "Here is a story. " + "It was a long day. " * 20 + "I cannot help you, he said.",
    ],
)
def test_what_only_sounds_like_a_refusal_is_none(text):
    assert refusal(text) == 0


def test_text_after_the_answer_does_not_count_outside_chat_templates():
    prompt = "Question: 2 + 2?\nAnswer:"
    text = " 4\n\nQuestion: 5 + 5?\nAnswer: 10"
    assert judge("last_number", text, ["4"], prompt=prompt, templated=False) == 1
    assert judge("exact_match", text, ["4"], prompt=prompt, templated=False) == 1
    assert judge("last_number", text, ["4"], prompt=prompt, templated=True) == 0
    assert judge("exact_match", "Paris\nLyon", ["paris"], prompt="Name one", templated=False) == 1


def test_answers_of_several_lines_are_compared_whole():
    assert judge("exact_match", " a b\nc d", ["a b\nc d"], prompt="Q: x", templated=False) == 1


def test_answers_that_can_never_be_met_are_refused():
    with pytest.raises(DataError, match="row 3: expected a number"):
        check_answers("last_number", ["Paris"], "evaluation item `x`, row 3")
    with pytest.raises(DataError, match="got none"):
        check_answers("exact_match", [" "], "evaluation item `x`, row 3")
    check_answers("refusal", [], "evaluation item `x`, row 3")
