"""Does a generated text give an accepted answer?

Exact match, F1, last number, choice, contains. Normalisation is SQuAD's (arXiv:1606.05250, its
evaluation script): lower case, no punctuation, no articles, single spaces; but numbers stay whole,
and what it would leave empty (the choice "A", a lone "%") is compared as it stands.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from forgetless.errors import DataError
from forgetless.evaluation.instructions import follows_instructions
from forgetless.evaluation.items import WITHOUT_REFERENCE
from forgetless.evaluation.numerals import last_number_of, number_of
from forgetless.evaluation.refusals import refusal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# What is no part of a number: its sign, point, slash and comma change its value.
_PUNCTUATION = re.compile(
    r"(?<![\w)])-(?=[.$]?\d)|(?<=\d)[./,](?=\d)|(?<![\w.])\.(?=\d)"
    f"|(?P<dropped>[{re.escape(string.punctuation)}])"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_ANSWER_IS = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is\b\s*:?|\s*:)\s*", re.IGNORECASE)
_LOWER_WORD = r"(?!['’\w])(?!\s+[a-z])"  # behind an "A", a sign of the article
_LETTER = rf"(?:A{_LOWER_WORD}|[B-H](?!['’\w]))"
_OPENS_WITH = re.compile(rf"[\W_]*(?:(?P<bare>{_LETTER})|(?<=\()(?P<inner>[A-Ha-h])\))")
_MARKED = re.compile(r"\((?P<inner>[A-Ha-h])\)|(?<![\w.'’(])(?P<bare>[A-H])[.)](?!\w)")
_ALONE = re.compile(rf"(?<![\w'’]){_LETTER}")


def normalise(text: str) -> str:
    """SQuAD normalisation that leaves numbers whole; lower-cased text where nothing would remain.

    -5, 3.5 and 1/2 keep their sign, point and slash, without which they would be 5, 35 and 12.
    """
    lowered = _THOUSANDS.sub(lambda n: n[0].replace(",", ""), text.lower().replace("−", "-"))
    bare = _PUNCTUATION.sub(lambda found: "" if found["dropped"] else found[0], lowered)
    return " ".join(_ARTICLES.sub(" ", bare).split()) or " ".join(bare.split()) or lowered.strip()


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 where text and accepted answer are equal: as numbers where both are, else in words."""
    return float(any(_equal(text, answer) for answer in answers))


def _equal(text: str, answer: str) -> bool:
    given, expected = number_of(text), number_of(answer)
    if given is not None and expected is not None:
        return given == expected
    return normalise(text) == normalise(answer)


def f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall, with the best accepted answer."""
    return max(_f1_one(normalise(text).split(), normalise(answer).split()) for answer in answers)


def _f1_one(given: list[str], expected: list[str]) -> float:
    if not given or not expected:
        return float(given == expected)
    common = sum((Counter(given) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def last_number(text: str, answers: Sequence[str]) -> float:
    """1 where the text's last number equals the last number of an accepted answer."""
    given = last_number_of(text)
    return float(given is not None and any(given == last_number_of(a) for a in answers))


def choice(text: str, answers: Sequence[str]) -> float:
    """1 where the choice that the text settles on is an accepted one.

    It is what follows the last "answer is" or "answer:". Without one, a letter is that which the
    text opens with, else the last marked one ("(B)", "B.", "B)"), else the first that stands alone;
    an "A" before a lower-case word is an article. A word or phrase must open the text.
    """
    return float(any(_chooses(text, answer) for answer in answers))


def _chooses(text: str, answer: str) -> bool:
    letter = answer.strip(string.punctuation + string.whitespace).upper()
    parts = _ANSWER_IS.split(text)
    if len(letter) == 1 and letter in "ABCDEFGH":
        # "The answer is clear: (B)" says no letter there, but says one.
        said = [found for part in parts[1:] if (found := _opening_letter(part))]
        return (said[-1] if said else _letter_in(text)) == letter
    words, expected = normalise(parts[-1] or text).split(), normalise(answer).split()
    return bool(expected) and words[: len(expected)] == expected


def _opening_letter(text: str) -> str | None:
    alone = text.strip(string.punctuation + string.whitespace)
    if len(alone) == 1:
        return alone.upper()
    opening = _OPENS_WITH.match(text)
    return None if opening is None else (opening["bare"] or opening["inner"]).upper()


def _letter_in(text: str) -> str | None:
    opening = _opening_letter(text)
    if opening is not None:
        return opening
    marked = [(found["bare"] or found["inner"]).upper() for found in _MARKED.finditer(text)]
    if marked:
        return marked[-1]
    first = _ALONE.search(text)
    return None if first is None else first.group()


def contains(text: str, answers: Sequence[str], labels: Sequence[str] = ()) -> float:
    """1 where an accepted answer stands in the text as whole words, both normalised.

    Without `labels` naming many things is rewarded. With them, every answer that may be given, a
    text that names a wrong one as well counts 0. A negated answer ("not the aunt") counts as named.
    """
    accepted = {normalise(answer) for answer in answers} - {""}
    known = (accepted | {normalise(label) for label in labels}) - {""}
    # The longest first, so that "new york" is not taken for "york".
    either = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    named = set(re.findall(rf"(?<!\S)(?:{either})(?!\S)", normalise(text)))
    return float(bool(named & accepted) and (not labels or named <= accepted))


Judge = Callable[[str, Sequence[str]], float]
JUDGES: dict[str, Judge] = {
    "exact_match": exact_match,
    "f1": f1,
    "last_number": last_number,
    "choice": choice,
    "contains": contains,
    "refusal": refusal,
    "instruction": follows_instructions,
}
_FIRST_LINE = frozenset({"exact_match", "f1"})


def judge(
    metric: str,
    text: str,
    answers: Sequence[str],
    *,
    prompt: str,
    templated: bool,
    labels: Sequence[str] = (),
) -> float:
    """Score one generated text.

    A model that was never taught to stop goes on after its answer, mostly with the next question.
    So outside chat templates the text ends where the prompt's own opening label ("Question:")
    begins a line again, and exact match and F1 read its first line, unless an accepted answer has
    several.

    Args:
        metric: One of `JUDGES`.
        text: What the model generated.
        answers: Accepted answers, or constraints for `instruction`.
        prompt: The prompt as text.
        templated: Whether a chat template wrote the prompt.
        labels: Every answer that may be given, for `contains`.
    """
    if not templated:
        text = before_next_question(text, prompt)
        if metric in _FIRST_LINE and not any("\n" in answer.strip() for answer in answers):
            text = text.strip().split("\n", 1)[0]
    if metric == "contains":
        return contains(text, answers, labels)
    return JUDGES[metric](text, answers)


def before_next_question(text: str, prompt: str) -> str:
    """Cut a text where the label that opens the prompt ("Q:", "Question:") begins a line again."""
    label = re.match(r"\s*(\w[\w ]{0,20}:)", prompt)
    if label is None:
        return text
    again = re.search(rf"^\s*{re.escape(label.group(1))}", text, re.MULTILINE)
    return text if again is None else text[: again.start()]


def check_answers(metric: str, answers: Sequence[str], where: str) -> None:
    """Refuse answers that a metric can never be met with.

    Raises:
        DataError: No number in any answer of `last_number`, or no answer at all.
    """
    if metric in WITHOUT_REFERENCE:
        return
    if not any(answer.strip() for answer in answers):
        raise DataError(
            f"{where}: expected an accepted answer for `{metric}`, got none; "
            "name the column that holds it in completion"
        )
    if metric == "last_number" and all(last_number_of(answer) is None for answer in answers):
        raise DataError(
            f"{where}: expected a number in the answer for `last_number`, got {answers[0]!r}; "
            f"use exact_match for answers without numbers"
        )
