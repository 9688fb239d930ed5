"""The headline in words, computed from the figures: what each run gained, what it forgot, who won.

A change whose paired 95 % interval contains 0 is not significant. A quick run claims nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from forgetless.escaping import one_line
from forgetless.evaluation.results import MetricResult
from forgetless.experiments.contrasts import MARGIN_NATS, MARGIN_PART, MARGIN_SHARE
from forgetless.experiments.numbers import (
    change_text,
    is_share,
    join_words,
    metric_name,
    pair_text,
    plain,
    range_text,
    value_text,
)
from forgetless.experiments.record import Record
from forgetless.experiments.runs import (
    Run,
    beyond_the_loss,
    gains_of,
    has_gained,
    has_improved,
    improvement,
    is_significant,
    items_of,
    measured,
    metric_of,
    name_runs,
    not_comparable,
)
from forgetless.experiments.verdicts import Verdict, clauses_of, judge, tally

QUICK = "A quick run claims nothing: too few steps and rows for any figure here to mean much."
ONE_SEED = (
    "One seed per method: the intervals are over evaluation rows "
    "and say nothing about another seed."
)
SOME_ONE_SEED = "Some methods have one seed only: nothing here says how they do with another."
BASELINE = (
    "Each method is held against one run of plain LoRA: of its own seed where there is one, and of "
    "those the one with the best {by}."
)
PAIRED = (
    "Two methods are compared row by row on the same rows, and called different where the paired "
    f"95 % interval leaves out 0; their gains are the same where it lies within "
    f"±{100 * MARGIN_SHARE:g} points (shares) or ±{MARGIN_NATS:g} nats (NLL), and "
    f"±{100 * MARGIN_PART:g} % of the larger gain."
)
UNPAIRED = (
    "Where records hold no figures row by row, two methods are called different if their own 95 % "
    "intervals do not touch: stricter than a comparison row by row, and never a proof of sameness."
)
_WIDTH = 80
_LONGEST_TITLE = 120


@dataclass(frozen=True)
class Clause:
    """By how much (`lead`), of what (`rest`), and whether to stress it."""

    lead: str
    rest: str
    strong: bool = True

    def __str__(self) -> str:
        """As running text."""
        return f"{self.lead}: {self.rest}" if self.rest else self.lead


@dataclass(frozen=True)
class RunWords:
    """One run in words: a clause for each thing gained, and for each thing forgotten."""

    run: Run
    gained: tuple[Clause, ...]
    forgot: tuple[Clause, ...]


@dataclass(frozen=True)
class Headline:
    """All that the report says in words. `title` is one sentence; `details` back it up."""

    title: str
    runs: tuple[RunWords, ...]
    details: tuple[str, ...]
    notes: tuple[str, ...]
    quick: bool


def headline(runs: Sequence[Run]) -> Headline:
    """Compute the words from the figures."""
    quick = any(run.record.recipe.get("claims") is False for run in runs)
    if quick:
        return Headline("Quick run: nothing is claimed", (), (), (QUICK,), True)
    words = tuple(RunWords(run, tuple(_gained(run)), tuple(_forgot(run))) for run in runs)
    reasons = not_comparable(runs)
    if reasons:
        title = f"{len(runs)} runs that cannot be compared: {join_words(reasons)}"
        return Headline(title, words, (), (), False)
    loras = [run for run in runs if run.is_lora]
    others = [run for run in runs if not run.is_lora]
    by_validation = all(run.record.training.validation_nll is not None for run in loras)
    verdicts = [judge(run, _baseline(run, loras, by_validation)) for run in others if loras]
    title = _title(runs, verdicts)
    words_of = clauses_of(verdicts)
    clauses = [f"{c}." for c in words_of] if title != "; ".join(words_of) else []
    details = (*clauses, *(detail for verdict in verdicts for detail in verdict.details))
    paired = {c.paired is not None for v in verdicts for c in (*v.gains, *v.losses)}
    notes = [PAIRED] * (True in paired) + [UNPAIRED] * (False in paired)
    if len(loras) > 1 and others:
        notes.append(BASELINE.format(by="validation NLL" if by_validation else "gain"))
    seeds: dict[tuple[str, float], set[int]] = {}
    for run in runs:
        recipe = f"{run.record.method} {beyond_the_loss(run.record)}"
        kind = (recipe, run.record.training.learning_rate)
        seeds.setdefault(kind, set()).add(run.record.seed)
    if any(len(found) == 1 for found in seeds.values()):
        notes.append(ONE_SEED if all(len(s) == 1 for s in seeds.values()) else SOME_ONE_SEED)
    return Headline(title, words, details, tuple(notes), False)


def _baseline(run: Run, loras: Sequence[Run], by_validation: bool) -> Run:
    """The plain-LoRA run to hold a method against: the best, so that no weak rate is beaten.

    By the gain on the evaluation rows themselves where no rows were held out for choosing: that
    favours plain LoRA.
    """
    same_seed = [lora for lora in loras if lora.record.seed == run.record.seed]
    candidates = same_seed or list(loras)
    if by_validation:
        return min(candidates, key=lambda lora: lora.record.training.validation_nll or 0.0)
    return max(candidates, key=_first_gain)


def _first_gain(run: Run) -> float:
    """The gain that stands first; −inf where nothing was measured."""
    for _, result in gains_of(run):
        better = improvement(result)
        if better is not None:
            return better.mean
    return -math.inf


def summary_lines(records: Sequence[Record]) -> list[str]:
    """The headline as plain lines of at most 80 columns, for the end of a command.

    Args:
        records: One or several records, in the order to show.

    Returns:
        Lines without newline or colour; one blank line after the title.
    """
    if not records:
        return []
    said = headline(name_runs(records))
    lines = textwrap.wrap(said.title + ".", _WIDTH)
    if said.runs:
        lines.append("")
    for words in said.runs:
        lines += textwrap.wrap(words.run.name, _WIDTH)
        for verb, clauses in (("gained", words.gained), ("forgot", words.forgot)):
            for place, clause in enumerate(clauses):
                start = f"  {verb if place == 0 else ' ' * len(verb)}  "
                lines += textwrap.wrap(
                    str(clause), _WIDTH, initial_indent=start, subsequent_indent=" " * 10
                )
    for text in (*said.details, *said.notes):
        lines += textwrap.wrap(text, _WIDTH)
    return lines


def _title(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> str:
    if items_of(runs, "gain") and not any(has_gained(run) for run in runs):
        if len(runs) == 1:
            return f"{runs[0].name} gained nothing significant{_forgot_title(runs[0])}"
        return "No run gained anything significant: there is nothing to compare"
    if len(runs) == 1:
        return f"{runs[0].name} {_gained_title(runs[0])}{_forgot_title(runs[0])}"
    if verdicts:
        sentence = "; ".join(clauses_of(verdicts))
        if len(sentence) <= _LONGEST_TITLE or len(verdicts) == 1:
            return sentence
        return tally(verdicts)
    if all(run.is_lora for run in runs):
        return f"{len(runs)} runs of plain LoRA, and no method to hold against them"
    return f"{len(runs)} runs, and no plain LoRA to hold them against"


def _gained_title(run: Run) -> str:
    words, named = [], set[str]()
    for item, result in gains_of(run):
        better = improvement(result)
        if item in named or better is None or not has_improved(result):
            continue
        named.add(item)
        size = _size(result.metric, better.mean)
        unit = "" if is_share(result.metric) else f" {metric_name(result.metric)}"
        words.append(f"{size}{unit} on {one_line(item)}")
    return (
        f"gained {join_words(words)}" if words else "was not measured on anything it should learn"
    )


def _forgot_title(run: Run) -> str:
    """What became worse; else what did not significantly, with the largest KL beside it."""
    found = [
        (i, metric_of(run.record.evaluation, i, "retention", m))
        for i, m in measured([run], "retention")
    ]
    if not found:
        return "; what it forgot was not measured"
    worse: list[str] = []
    changes = [(item, r, improvement(r)) for item, r in found if r and r.metric != "kl"]
    for item, _, better in changes:
        if better and is_significant(better) and better.high < 0:
            worse.append(one_line(item))
    if worse:
        return f" and forgot some of {join_words(list(dict.fromkeys(worse)))}"
    kls = [r.tuned.mean for _, r in found if r and r.metric == "kl"]
    if changes:
        names = join_words(list(dict.fromkeys(metric_name(r.metric) for _, r, _ in changes)))
        items = join_words(list(dict.fromkeys(one_line(item) for item, _, _ in changes)))
        upto = f"; KL {'up to ' if len(kls) > 1 else ''}{plain(max(kls))}" if kls else ""
        return f"; {names} on {items} not significantly worse{upto}"
    return f" at a KL to the base of up to {plain(max(kls))}" if kls else ""


def _gained(run: Run) -> list[Clause]:
    """Each item's own metric, and whatever else improved significantly."""
    clauses, met = [], set[str]()
    for item, result in gains_of(run):
        if item not in met or has_improved(result):
            clauses.append(_clause(item, result))
        met.add(item)
    return clauses or [Clause("not measured", "", strong=False)]


def _forgot(run: Run) -> list[Clause]:
    """KL of every item, then each item's shares; NLL where it changed or nothing else is there."""
    report = run.record.evaluation
    kls, clauses = [], []
    for item in items_of([run], "retention"):
        metrics = [m for name, m in measured([run], "retention") if name == item]
        for metric in metrics:
            result = metric_of(report, item, "retention", metric)
            if result is None:
                continue
            if metric == "kl":
                kls.append(f"{plain(result.tuned.mean)} on {one_line(item)}")
            elif (
                is_share(metric) or is_significant(result.change) or not any(map(is_share, metrics))
            ):
                clauses.append(_clause(item, result))
    first = [Clause("KL to the base", ", ".join(kls))] if kls else []
    return first + clauses or [Clause("not measured", "", strong=False)]


def _clause(item: str, result: MetricResult) -> Clause:
    """`+51.5 pts, better` of `last number on sums, 12.0 % → 63.5 % (45.0 to 58.0)`."""
    metric, change = result.metric, result.change
    name = f"{metric_name(metric)} on {one_line(item)}"
    if change is None or result.base is None:
        return Clause(value_text(metric, result.tuned.mean), name)
    base, tuned = pair_text(metric, result.base.mean, result.tuned.mean)
    interval = range_text(metric, change, change=True)
    levels = f"{name}, {base} → {tuned}"
    rest = f"{levels} ({interval})" if interval else f"{levels} (one row, no interval)"
    moved = change_text(metric, change.mean)
    if is_significant(change):
        return Clause(f"{moved}, {'better' if has_improved(result) else 'worse'}", rest)
    return Clause(f"{moved}, not significant", rest, strong=False)


def _size(metric: str, value: float) -> str:
    text = change_text(metric, value).lstrip("+")
    return text.replace("pts", "points")
