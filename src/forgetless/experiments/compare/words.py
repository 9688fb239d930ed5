"""A comparison in words: who wins, what is within noise, and where plain LoRA wins."""

from __future__ import annotations

import math
from collections.abc import Sequence

from forgetless.escaping import one_line
from forgetless.experiments.compare.bands import MOST_OF_THE_GAIN
from forgetless.experiments.compare.results import ArmResult, Interval, Law, Matched, Outcome
from forgetless.experiments.numbers import join_words, metric_name, plain, signed

_MOST_NAMES = 4


def title_of(arms: Sequence[ArmResult]) -> str:
    """One sentence: who keeps more than plain LoRA at the same gain, on all that is to be kept."""
    if not arms:
        return "No runs to compare"
    if not any(arm.is_lora for arm in arms):
        return f"{_methods(len(arms))}, and no plain LoRA to hold them against"
    others = [arm for arm in arms if arm.decay is None]
    if not others:
        return "Plain LoRA alone: no method to hold against it"
    groups = _groups(others)
    told = {
        group: _names([_told(arm, arms) for arm in found])
        for group, found in groups.items()
        if found
    }
    clauses = []
    if groups["everywhere"]:
        sets = len(dict.fromkeys((item, metric) for _, item, metric in _planes(arms)))
        where = f", on all {sets} sets" if sets > 1 else ""
        clauses.append(f"{told['everywhere']} kept more than plain LoRA at the same gain{where}")
    if groups["partly"]:
        clauses.append(
            f"{told['partly']} on some"
            if clauses
            else f"{told['partly']} kept more than plain LoRA at the same gain, on some sets"
        )
    if groups["mixed"]:
        clauses.append(f"{told['mixed']} kept more on some sets and less on others")
    if groups["lost"]:
        clauses.append(
            f"plain LoRA kept more than {told['lost']}"
            if clauses
            else f"Plain LoRA wins: no method kept more at the same gain, and {told['lost']} less"
        )
    if groups["gained more"]:
        clauses.append(
            f"{told['gained more']} gained more than LoRA ever did, and did not keep more"
        )
    if groups["unclear"] and not clauses:
        clauses.append("No method can be told from plain LoRA at the same gain")
    if groups["gained nothing"] and not clauses:
        clauses.append(f"{told['gained nothing']} gained nothing")
    if not clauses:
        return "Nothing can be said: no method could be held against plain LoRA at the same gain"
    lora = next(arm for arm in arms if arm.is_lora)
    return "; ".join(clauses) + (", by one seed" if len(lora.seeds) == 1 else "")


def _groups(arms: Sequence[ArmResult]) -> dict[str, list[ArmResult]]:
    """Arms by what is said of them all in all; those that kept most go first."""
    found: dict[str, list[ArmResult]] = {
        name: []
        for name in (
            "everywhere",
            "partly",
            "mixed",
            "lost",
            "gained more",
            "unclear",
            "gained nothing",
            "unknown",
        )
    }
    for arm in sorted((arm for arm in arms if _shown(arm)), key=_mean_size):
        outcomes = _outcomes(arm)
        if outcomes == {"kept more"}:
            group = "everywhere"
        elif "kept more" in outcomes:
            group = "mixed" if "lost more" in outcomes else "partly"
        else:
            order = ("lost more", "gained more", "unclear", "gained nothing", "unknown")
            outcome = next(one for one in order if one in outcomes)
            group = "lost" if outcome == "lost more" else outcome
        found[group].append(arm)
    return found


def _told(arm: ArmResult, arms: Sequence[ArmResult]) -> str:
    """Its name, with its one seed where plain LoRA has more."""
    several = any(other.is_lora and len(other.seeds) > 1 for other in arms)
    return f"{arm.name} (one seed)" if several and len(arm.seeds) == 1 else arm.name


def words_of(arms: Sequence[ArmResult], laws: Sequence[Law]) -> list[str]:
    """A sentence for each verdict, front and law."""
    found: list[str] = []
    for gain, item, metric in _planes(arms):
        found += _verdicts(arms, gain, item, metric)
    for gain, item, metric in _planes(arms):
        sentence = _front(arms, gain, item, metric)
        found += [sentence] if sentence else []
    found += [sentence for law in laws if (sentence := _law(arms, law))]
    found += _bands(arms)
    return found


def notes_of(
    arms: Sequence[ArmResult], level: float, lora: str | None, fewest_seeds: int
) -> list[str]:
    """How to read it, and what is missing.

    Args:
        arms: All of them.
        level: Of the verdicts' intervals.
        lora: Which arm stands for plain LoRA, where there are several.
        fewest_seeds: Of LoRA's family, at any rate.
    """
    notes = []
    unchosen = [arm.name for arm in arms if arm.chosen_rate is None]
    if any(len(arm.rates) > 1 and arm.chosen_rate is not None for arm in arms):
        notes.append(
            "Each method stands at the rate with the least NLL on rows held out of training; "
            "evaluation rows choose nothing."
        )
    if unchosen:
        notes.append(
            f"No rate is chosen for {_names(unchosen)}: runs without rows kept out of training "
            "for that (training.validation_rows)."
        )
    if len(unchosen) < len(arms):
        notes.append(_seeds(arms))
    if lora is not None:
        notes.append(
            f"Several arms are plain LoRA: at the same gain methods are held against all of them, "
            f"and {lora} stands for them elsewhere, by the least NLL on rows held out."
        )
    if any(arm.matched for arm in arms):
        most = max((len(arm.seeds) for arm in arms if arm.decay is not None), default=0)
        other_rates = " (LoRA has one seed at other rates)" if fewest_seeds == 1 < most else ""
        notes.append(
            "At the same gain: plain LoRA with the rate, the weight decay or the factor on ΔW that "
            "gains as much, whichever loses least; interpolated between measured points. Verdicts "
            f"are by intervals at {100 * level:.4g} %, so that 95 % holds for all of them, over "
            "rows, and over seeds where both sides have several: with one, another seed may turn a "
            f"verdict{other_rates}. LoRA has more tries than the method, so that `lost more` is "
            "the weaker verdict. Intervals shown are at 95 % each."
        )
    if any(arm.is_lora for arm in arms) and not any(arm.decay for arm in arms):
        notes.append(
            "No LoRA with weight decay is among the runs: it is a strong baseline, add it "
            "(training.weight_decay 0.1 and 0.3)."
        )
    return notes


def _verdicts(arms: Sequence[ArmResult], gain: str, item: str, metric: str) -> list[str]:
    found = [
        (_told(arm, arms), one)
        for arm in arms
        for one in arm.matched
        if (one.gain, one.item, one.metric) == (gain, item, metric)
    ]
    groups: dict[Outcome, list[str]] = {}
    for name, one in sorted(found, key=lambda pair: _size(pair[1])):
        groups.setdefault(one.outcome, []).append(f"{name} {_factor(one)}")
    if not groups:
        return []
    kind = "times plain LoRA's" if metric == "kl" else "against plain LoRA's"
    openings: dict[Outcome, str] = {
        "kept more": "kept more",
        "lost more": "lost more",
        "gained more": "gained more than LoRA and did not keep more",
        "unclear": "cannot be told apart",
        "gained nothing": "gained nothing",
        "unknown": "not known",
    }
    parts = [f"{openings[o]}: {', '.join(groups[o])}" for o in openings if o in groups]
    return [
        f"{metric_name(metric)} on {one_line(item)} at the same gain on {one_line(gain)}, {kind}: "
        f"{'; '.join(parts)}."
    ]


def _front(arms: Sequence[ArmResult], gain: str, item: str, metric: str) -> str:
    """Whoever is on it now, or is in more than one resample of twenty."""
    found = []
    for arm in arms:
        for place in arm.fronts:
            if (place.gain, place.item, place.metric) == (gain, item, metric) and (
                place.is_on_front or place.probability > 0.05
            ):
                now = "" if place.is_on_front else ", not now"
                found.append(f"{arm.name} (P {place.probability:.2f}{now})")
    where = f"{metric_name(metric)} on {one_line(item)} against the gain on {one_line(gain)}"
    return f"Front of {where}: {', '.join(found)}." if found else ""


def _law(arms: Sequence[ArmResult], law: Law) -> str:
    beating = []
    for arm in arms:
        for one in arm.residuals:
            if (one.item, one.metric) == (law.item, law.metric) and one.beats:
                beating.append(f"{arm.name} ({_interval(one.factor)} times)")
    who = f"beaten by {', '.join(beating)}" if beating else "no method beats it"
    return (
        f"Update size explains {100 * max(law.r_squared, 0):.0f} % of log "
        f"{metric_name(law.metric)} on {one_line(law.item)} (slope {law.slope:.2f}, {law.points} "
        f"points); {who}."
    )


def _bands(arms: Sequence[ArmResult]) -> list[str]:
    known = [arm for arm in arms if len(arm.rates) > 1 and arm.chosen_rate is not None]
    if not known:
        return []
    parts = []
    for arm in known:
        if arm.band is None:
            parts.append(f"{arm.name} none")
        elif arm.band.low == arm.band.high:
            parts.append(f"{arm.name} {arm.band.low:g} alone")
        else:
            parts.append(f"{arm.name} {arm.band.low:g} to {arm.band.high:g}")
    limit = "plain LoRA at its own" if any(arm.is_lora for arm in arms) else "at the chosen one"
    most = f"{100 * MOST_OF_THE_GAIN:.0f} %"
    return [
        f"Rates that keep {most} of the gain and lose no more than {limit}: {'; '.join(parts)}."
    ]


def _seeds(arms: Sequence[ArmResult]) -> str:
    numbers = {len(arm.seeds) for arm in arms if arm.chosen_rate is not None}
    single = [arm.name for arm in arms if len(arm.seeds) == 1]
    if numbers == {1}:
        return "One seed: intervals are over evaluation rows and say nothing about another seed."
    parts = [
        f"{number} {'seed' if number == 1 else 'seeds'} for "
        f"{_names([a.name for a in arms if len(a.seeds) == number])}"
        for number in sorted(numbers, reverse=True)
    ]
    text = f"At the chosen rate: {'; '.join(parts)}. Intervals are over evaluation rows and seeds"
    return text + ("; of what has one seed, the noise of seeds is missing." if single else ".")


def _planes(arms: Sequence[ArmResult]) -> list[tuple[str, str, str]]:
    """Gain and first metric of each item: those that have a front."""
    return list(dict.fromkeys((p.gain, p.item, p.metric) for arm in arms for p in arm.fronts))


def _outcomes(arm: ArmResult) -> set[Outcome]:
    return {one.outcome for one in _shown(arm)}


def _mean_size(arm: ArmResult) -> float:
    shown = [_size(one) for one in _shown(arm)]
    return sum(shown) / len(shown)


def _shown(arm: ArmResult) -> list[Matched]:
    planes = {(p.gain, p.item, p.metric) for p in arm.fronts}
    return [one for one in arm.matched if (one.gain, one.item, one.metric) in planes]


def _size(one: Matched) -> float:
    return math.inf if one.best.value is None else one.best.value


def _factor(one: Matched) -> str:
    text = _interval(one.best, change=not one.is_ratio)
    return f"{text}, gaining more than LoRA ever does" if one.beyond else text


def _interval(figure: Interval, *, change: bool = False) -> str:
    write = signed if change else plain
    if figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return write(figure.value)
    return f"{write(figure.value)} ({write(figure.low)} to {write(figure.high)})"


def _names(names: Sequence[str]) -> str:
    """At most four by name."""
    if len(names) <= _MOST_NAMES:
        return join_words(list(names))
    return f"{', '.join(names[: _MOST_NAMES - 1])} and {len(names) - _MOST_NAMES + 1} others"


def _methods(number: int) -> str:
    return "1 method" if number == 1 else f"{number} methods"
