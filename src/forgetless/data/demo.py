"""Data of the demo: a task to learn, and world facts to keep.

The task is `family_relationships` of reasoning-gym (Apache-2.0): one word answers it, and a program
can tell whether it is right. The facts come from `forgetless.data.facts`; those to calibrate on and
those to evaluate on are about different countries, states and elements.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import reasoning_gym

from forgetless.atomic import write_atomically
from forgetless.data.facts import Fact, all_facts

Record = dict[str, Any]
TASK = "family_relationships"
# Every relation that the task knows: an answer that names a wrong one as well is wrong.
RELATIONS = (
    *("mother", "father", "sister", "brother", "daughter", "son", "wife", "husband"),
    *("grandmother", "grandfather", "aunt", "uncle", "niece", "nephew"),
    *("mother-in-law", "father-in-law", "mother in law", "father in law"),
)
_EVALUATED_SHARE = 0.55  # of the entities; the others are calibrated on


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """How many rows of each kind."""

    train: int
    gain_test: int
    calibration_facts: int
    evaluation_facts: int


FULL = DemoSizes(train=192, gain_test=80, calibration_facts=192, evaluation_facts=200)
QUICK = DemoSizes(train=44, gain_test=12, calibration_facts=64, evaluation_facts=24)
# Shorter than the chat template's own, which would be half of every row's tokens.
_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


@dataclass(frozen=True, slots=True)
class DemoData:
    """Records as a data spec reads them from `examples` or from a JSONL file.

    Attributes:
        train: `messages`: a question, and its one-word answer.
        gain_test: The same, to measure the gain on.
        calibration_facts: `prompt`: chat messages that end inside the assistant's reply;
            `completion`: the words that go on there; `family`: the kind of fact.
        evaluation_facts: The same, about other entities.
    """

    train: tuple[Record, ...]
    gain_test: tuple[Record, ...]
    calibration_facts: tuple[Record, ...]
    evaluation_facts: tuple[Record, ...]

    def write(self, folder: Path) -> dict[str, Path]:
        """Write each part as JSONL into a folder; returns part name to file."""
        files = {}
        for field in fields(self):
            records: Sequence[Record] = getattr(self, field.name)
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            files[field.name] = write_atomically(folder / f"{field.name}.jsonl", lines)
        return files


def demo_specs(seed: int = 0, quick: bool = False) -> DemoData:
    """Make the demo's data; the same ones for the same seed.

    Args:
        seed: Of the task's questions and of which entities are evaluated.
        quick: Fewer rows of everything.
    """
    sizes = QUICK if quick else FULL
    task = _task_records(sizes.train + sizes.gain_test, seed)
    calibration, evaluation = _split_by_entity(all_facts(), seed)
    return DemoData(
        train=tuple(task[sizes.gain_test :]),
        gain_test=tuple(task[: sizes.gain_test]),
        calibration_facts=_fact_records(calibration, sizes.calibration_facts, seed),
        evaluation_facts=_fact_records(evaluation, sizes.evaluation_facts, seed),
    )


def _task_records(count: int, seed: int) -> list[Record]:
    """Different questions; the generator repeats itself now and then.

    Its in-law answers are left out: they name the second person's relation to the first, where all
    others, and the question, name the first one's to the second.
    """
    questions: dict[str, str] = {}
    source = reasoning_gym.create_dataset(TASK, size=2 * count, seed=seed, max_family_size=5)
    for entry in source:
        answer = str(entry["answer"])
        if not answer.endswith("-in-law"):
            questions.setdefault(str(entry["question"]), answer)
        if len(questions) == count:
            break
    assert len(questions) == count
    return [
        {
            "messages": [
                _SYSTEM,
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in questions.items()
    ]


def _split_by_entity(facts: Sequence[Fact], seed: int) -> tuple[list[Fact], list[Fact]]:
    """Facts to calibrate on and facts to evaluate on; no entity on both sides."""
    by_kind: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        by_kind[fact.entity.split()[0]].add(fact.entity)
    evaluated: set[str] = set()
    for kind, entities in sorted(by_kind.items()):
        drawn = sorted(entities)
        random.Random(f"{seed} {kind}").shuffle(drawn)
        evaluated.update(drawn[: round(_EVALUATED_SHARE * len(drawn))])
    calibration = [fact for fact in facts if fact.entity not in evaluated]
    return calibration, [fact for fact in facts if fact.entity in evaluated]


def _fact_records(facts: Sequence[Fact], count: int, seed: int) -> tuple[Record, ...]:
    """As many facts of each family as there are, in turn, until `count` are taken."""
    by_family: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_family[fact.family].append(fact)
    for family, members in by_family.items():
        random.Random(f"{seed} {family}").shuffle(members)
    taken: list[Fact] = []
    while len(taken) < count and any(by_family.values()):
        for members in by_family.values():
            if members and len(taken) < count:
                taken.append(members.pop())
    assert len(taken) == count, f"expected {count} facts, got {len(taken)}"
    return tuple(
        {
            "family": fact.family,
            "prompt": [
                _SYSTEM,
                {"role": "user", "content": fact.question},
                {"role": "assistant", "content": fact.stem},
            ],
            "completion": f" {fact.answer}",
        }
        for fact in taken
    )
