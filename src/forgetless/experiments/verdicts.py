"""A method against plain LoRA, in words: who gained more, who forgot less, what rows cannot tell.

Where both records hold their figures row by row, on rows of the same fingerprint, the difference of
the two runs is paired by row. Otherwise (older records) two runs differ where their own intervals
do not touch. A difference that is not significant is no sameness: gains are called the same only
where the paired interval lies within a margin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from forgetless.escaping import one_line
from forgetless.experiments.contrasts import Contrast, contrast
from forgetless.experiments.matched import against_scaled_lora
from forgetless.experiments.numbers import change_text, is_share, join_words, metric_name, pair_text
from forgetless.experiments.runs import (
    Run,
    gain_metric,
    has_gained,
    items_of,
    kl_floor,
    retention_metrics,
)

Outcome = Literal["more", "less", "same", "some more", "some less", "mixed", "unclear", "unknown"]

_FIRST = {
    "more": "forgot more than {lora}",
    "less": "forgot less than {lora}",
    "some more": "forgot more than {lora} on {more}",
    "some less": "forgot less than {lora} on {less}",
    "mixed": "forgot less than {lora} on {less} but more on {more}",
}
_BOTH_UP = {
    ("more", "less"): "gained more than {lora} and forgot less",
    ("more", "more"): "gained more than {lora}, but forgot more",
}
_THEN = {
    "more": " and gained more",
    "less": ", but gained less",
    "same": " at the same gain",
    "some more": " and gained more on {gained_more}",
    "some less": ", but gained less on {gained_less}",
    "mixed": "; it gained more on {gained_more}, less on {gained_less}",
    "unclear": "; which gained more, these rows cannot tell",
    "unknown": "",
}
_GAIN_ONLY = {
    "more": "gained more than {lora}",
    "less": "gained less than {lora}",
    "same": "gained as much as {lora}",
    "some more": "gained more than {lora} on {gained_more}",
    "some less": "gained less than {lora} on {gained_less}",
    "mixed": "gained more than {lora} on {gained_more}, less on {gained_less}",
}
# (gain, forgetting) of the method → how LoRA beat it.
_LORA_DID = {
    ("same", "more"): "it forgot less at the same gain",
    ("less", "more"): "it gained more and forgot less",
    ("less", "unknown"): "it gained more",
    ("unknown", "more"): "it forgot less",
}
_METHOD_BETTER = {("more", "less"), ("same", "less"), ("unknown", "less"), ("more", "unknown")}
# What to say in place of forgetting where KL alone tells two runs apart; longer phrases first.
_BY_KL = {
    "forgot less than {lora}": "moved less from the base than {lora}",
    "forgot more than {lora}": "moved further from the base than {lora}",
    "which forgot more": "which moved further from the base",
    "forgot less": "moved less from the base",
    "forgot more": "moved further from the base",
}
_RUN = "\0"  # stands for the method's name in a clause; no name holds it, names are cleaned


@dataclass(frozen=True)
class Verdict:
    """One method against one plain-LoRA run."""

    run: Run
    lora: Run
    gain: Outcome
    forgot: Outcome
    gains: tuple[Contrast, ...]
    losses: tuple[Contrast, ...]
    details: tuple[str, ...]

    @property
    def gained_nothing(self) -> bool:
        """Whether the method learnt nothing significant: then it has not won, whatever it kept."""
        return self.gain != "unknown" and not has_gained(self.run)

    @property
    def only_lora_gained(self) -> bool:
        """Whether plain LoRA learnt something, the method nothing, and these rows tell them apart.

        One significant change beside one that is not is no difference yet.
        """
        apart = self.gain in ("less", "some less")
        return apart and self.gained_nothing and has_gained(self.lora)

    @property
    def by_kl_alone(self) -> bool:
        """Whether only KL tells them apart: a changed model, which need not be a worse one."""
        telling = [c for c in self.losses if c.sign] or self.losses
        return bool(telling) and all(c.metric == "kl" for c in telling)

    @property
    def lora_won(self) -> bool:
        """Whether plain LoRA was better on one side and not worse on the other."""
        return self.only_lora_gained or (self.gain, self.forgot) in _LORA_DID

    @property
    def method_won(self) -> bool:
        """Whether the method was better on one side and not worse on the other."""
        return not self.gained_nothing and (self.gain, self.forgot) in _METHOD_BETTER


def judge(run: Run, lora: Run) -> Verdict:
    """Compare a run with a plain-LoRA run, item by item."""
    pair = [run, lora]
    gains: list[Contrast] = []
    for item in items_of(pair, "gain"):
        metric = gain_metric(pair, item)
        found = contrast(run, lora, item, "gain", metric) if metric else None
        gains += [found] if found else []
    losses: list[Contrast] = []
    for item in items_of(pair, "retention"):
        for metric in retention_metrics(pair, item):
            found = contrast(run, lora, item, "retention", metric)
            losses += [found] if found else []
    same = bool(gains) and all(c.is_same for c in gains)
    details = [*_in_figures(run, lora, gains, losses), *against_scaled_lora(run, lora)]
    return Verdict(
        run=run,
        lora=lora,
        gain="same" if same else _outcome(gains),
        forgot=_outcome(losses),
        gains=tuple(gains),
        losses=tuple(losses),
        details=tuple(details),
    )


def clauses_of(verdicts: Sequence[Verdict]) -> list[str]:
    """All verdicts as clauses; methods with the same verdict share one."""
    names: dict[str, list[str]] = {}
    for verdict in verdicts:
        names.setdefault(_clause(verdict), []).append(verdict.run.name)
    clauses = [clause.replace(_RUN, join_words(found)) for clause, found in names.items()]
    return [re.sub("^plain LoRA", "Plain LoRA", clause) for clause in clauses]


def tally(verdicts: Sequence[Verdict]) -> str:
    """The verdicts counted, for where naming them all would be too long."""
    better = sum(verdict.method_won for verdict in verdicts)
    worse = sum(verdict.lora_won for verdict in verdicts)
    many = "comparison" if len(verdicts) == 1 else "comparisons"
    return (
        f"{len(verdicts)} {many} with plain LoRA: the method did better in {better}, "
        f"plain LoRA in {worse}; {len(verdicts) - better - worse} unclear or a trade"
    )


def lora_words(lora: Run) -> str:
    """The baseline in a sentence: its label only where that says more than `LoRA`."""
    bare = lora.name.casefold() in {"lora", "plain lora"}
    return "plain LoRA" if bare else f"plain LoRA ({lora.name})"


def _clause(verdict: Verdict) -> str:
    """One verdict in words, with `_RUN` where the method's name belongs."""
    words = _words(verdict)
    if verdict.by_kl_alone:
        for forgot, moved in _BY_KL.items():
            words = words.replace(forgot, moved)
    if verdict.gained_nothing and not verdict.only_lora_gained:
        words += f"; {_RUN} gained nothing significant"
    places = {
        "{less}": _where(verdict.losses, -1),
        "{more}": _where(verdict.losses, 1),
        "{gained_less}": _where(verdict.gains, -1),
        "{gained_more}": _where(verdict.gains, 1),
        "{lora}": lora_words(verdict.lora),  # last: a label may hold any text
    }
    for place, text in places.items():
        words = words.replace(place, text)
    return words


def _words(verdict: Verdict) -> str:
    """The clause with places for names: `_RUN`, `{lora}`, `{less}` …."""
    key = (verdict.gain, verdict.forgot)
    if verdict.only_lora_gained:
        return f"{{lora}} did better than {_RUN} at learning: {_RUN} gained nothing significant"
    if key in _LORA_DID:
        return f"{{lora}} did better than {_RUN}: {_LORA_DID[key]}"
    if key == ("unknown", "unknown"):
        return f"{_RUN} and {{lora}} were measured on nothing that both have"
    if verdict.forgot not in _FIRST and verdict.gain not in _GAIN_ONLY:
        return f"{_RUN} against {{lora}}: these rows cannot tell which did better"
    if key in _BOTH_UP:
        words = _BOTH_UP[key]
    elif verdict.forgot in _FIRST:
        words = _FIRST[verdict.forgot] + _THEN[verdict.gain]
    else:
        unclear = "; which forgot more, these rows cannot tell"
        words = _GAIN_ONLY[verdict.gain] + (unclear if verdict.forgot == "unclear" else "")
    return f"{_RUN} {words}"


def _signs(contrasts: Sequence[Contrast]) -> dict[str, set[int]]:
    """By item, the directions in which its metrics tell two runs apart: none, one, or both."""
    signs: dict[str, set[int]] = {}
    for c in contrasts:
        signs.setdefault(c.item, set()).update({c.sign} - {0})
    return signs


def _where(contrasts: Sequence[Contrast], sign: int) -> str:
    """Items of a direction; with the metric where another metric of the item says the opposite."""
    signs = _signs(contrasts)
    names = [
        f"{one_line(c.item)} by {metric_name(c.metric)}"
        if len(signs[c.item]) > 1
        else one_line(c.item)
        for c in contrasts
        if c.sign == sign
    ]
    return join_words(list(dict.fromkeys(names))) if names else ""


def _outcome(contrasts: Sequence[Contrast]) -> Outcome:
    """Over items; metrics of one item that tell nothing do not weaken one that does."""
    if not contrasts:
        return "unknown"
    signs = _signs(contrasts)
    up, down = (sum(sign in found for found in signs.values()) for sign in (1, -1))
    if up and down:
        return "mixed"
    if up:
        return "more" if up == len(signs) else "some more"
    if down:
        return "less" if down == len(signs) else "some less"
    return "unclear"


def _in_figures(
    run: Run, lora: Run, gains: Sequence[Contrast], losses: Sequence[Contrast]
) -> list[str]:
    """What stands behind a verdict: gains and losses of both, and their paired difference."""
    details = [_gain_in_figures(run, lora, c) for c in gains]
    kls = [_kl_in_figures(run, lora, c) for c in losses if c.metric == "kl"]
    if kls:
        details.append(f"KL to the base, {run.name} against {lora.name}: {', '.join(kls)}.")
    for c in losses:
        if c.metric != "kl":
            ours, theirs = _changes(c)
            known = f" ({c.interval})" if c.interval else ""
            details.append(
                f"{run.name} lost {ours} of {metric_name(c.metric)} on {one_line(c.item)} to "
                f"{lora.name}'s {theirs}{known}."
            )
    return details


def _gain_in_figures(run: Run, lora: Run, c: Contrast) -> str:
    ours, theirs = _changes(c)
    what = f"{metric_name(c.metric)} on {one_line(c.item)}"
    head = f"{run.name} gained {ours} to {lora.name}'s {theirs} ({what})"
    known = f" ({c.interval})" if c.interval else " (intervals of the two runs, not paired)"
    if c.is_same:
        apart = f"{c.size} {'more' if c.sign > 0 else 'less'}, " if c.sign else "the same "
        return f"{head}: {apart}within the margin{known}."
    if c.sign:
        return f"{head}: {c.size} {'more' if c.sign > 0 else 'less'}{known}."
    return f"{head}, a difference that these rows cannot tell from 0{known}."


def _changes(c: Contrast) -> tuple[str, str]:
    if is_share(c.metric):
        texts = [change_text(c.metric, e.mean).lstrip("+") for e in (c.ours, c.theirs)]
        return texts[0].replace("pts", "points"), texts[1].removesuffix("pts").strip()
    return pair_text(c.metric, c.ours.mean, c.theirs.mean)


def _kl_in_figures(run: Run, lora: Run, c: Contrast) -> str:
    ours, theirs = pair_text("kl", c.ours.mean, c.theirs.mean)
    words = f"{ours} against {theirs} on {one_line(c.item)}"
    floor = max(kl_floor(run), kl_floor(lora))
    if min(c.ours.mean, c.theirs.mean) <= floor:
        return f"{words} (at the rounding floor of a 16-bit base, about {floor:g}: no ratio holds)"
    if not 0 < c.ours.mean < c.theirs.mean < float("inf"):
        return words
    times = c.theirs.mean / c.ours.mean
    factor = f"{times:.0f}" if times >= 9.95 else f"{times:.1f}"
    return f"{words} ({factor} times less)" if times >= 1.05 and c.sign < 0 else words
