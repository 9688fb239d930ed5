"""A method against plain LoRA, in words: who gained more, who forgot less, what noise hides.

Two runs differ where their 95 % intervals do not touch. The intervals are those of each run against
the base, so this is stricter than a paired test of the two runs: it errs towards "within noise".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from forgetless.evaluation.results import Estimate, EvaluationReport
from forgetless.experiments.numbers import join_words, metric_name, one_line, plain
from forgetless.experiments.runs import (
    Run,
    gain_metric,
    improvement,
    is_significant,
    items_of,
    loss,
    metric_of,
    retention_metric,
)

Outcome = Literal["more", "less", "same", "mixed", "unknown"]

# (gain, forgetting) of the method against LoRA → what the method did; `{lora}` names the baseline.
_METHOD_DID = {
    ("more", "less"): "gained more than {lora} and forgot less",
    ("same", "less"): "forgot less than {lora} at the same gain, within noise",
    ("less", "less"): "forgot less than {lora}, but gained less",
    ("more", "more"): "gained more than {lora}, but forgot more",
    ("more", "same"): "gained more than {lora} and forgot as much, within noise",
    ("same", "same"): "does not differ from {lora} by more than noise",
    ("unknown", "less"): "forgot less than {lora}",
    ("unknown", "same"): "forgot as much as {lora}, within noise",
    ("more", "unknown"): "gained more than {lora}",
    ("same", "unknown"): "gained as much as {lora}, within noise",
}
# (gain, forgetting) of the method → how LoRA beat it.
_LORA_DID = {
    ("less", "same"): "it gained more and forgot no more, within noise",
    ("same", "more"): "it forgot less at the same gain, within noise",
    ("less", "more"): "it gained more and forgot less",
    ("less", "unknown"): "it gained more",
    ("unknown", "more"): "it forgot less",
}
_METHOD_BETTER = {
    ("more", "less"), ("same", "less"), ("more", "same"), ("unknown", "less"), ("more", "unknown"),
}  # fmt: skip
_GAINED = {
    "more": "gained more",
    "less": "gained less",
    "same": "gained as much, within noise,",
    "mixed": "gained more on some items, less on others",
}
_RUN = "\0"  # stands for the method's name in a clause; no name holds it, names are cleaned


@dataclass(frozen=True)
class Verdict:
    """One method against one plain-LoRA run."""

    run: Run
    lora: Run
    gain: Outcome
    forgot: Outcome
    less_on: tuple[str, ...]
    more_on: tuple[str, ...]
    details: tuple[str, ...]

    @property
    def only_lora_gained(self) -> bool:
        """Whether plain LoRA learnt something, and the method nothing significant."""
        return self.gain != "unknown" and has_gained(self.lora) and not has_gained(self.run)

    @property
    def lora_won(self) -> bool:
        """Whether plain LoRA was better on one side and not worse on the other."""
        return self.only_lora_gained or (self.gain, self.forgot) in _LORA_DID

    @property
    def method_won(self) -> bool:
        """Whether the method was better on one side and not worse on the other."""
        return not self.only_lora_gained and (self.gain, self.forgot) in _METHOD_BETTER


def has_gained(run: Run) -> bool:
    """Whether a run improved significantly on at least one gain item."""
    for item in items_of([run], "gain"):
        metric = gain_metric([run], item)
        result = metric and metric_of(run.record.evaluation, item, "gain", metric)
        better = improvement(result) if result else None
        if better is not None and is_significant(better) and better.low > 0:
            return True
    return False


def judge(run: Run, lora: Run) -> Verdict:
    """Compare a run with a plain-LoRA run, item by item."""
    pair = [run, lora]
    gains: dict[str, int] = {}
    for item in items_of(pair, "gain"):
        if metric := gain_metric(pair, item):
            gains[item] = _compare(*(_gain(r.record.evaluation, item, metric) for r in pair))
    losses: dict[str, int] = {}
    for item in items_of(pair, "retention"):
        if metric := retention_metric(pair, item):
            losses[item] = _compare(*(_loss(r.record.evaluation, item, metric) for r in pair))
    return Verdict(
        run=run,
        lora=lora,
        gain=_outcome(list(gains.values())),
        forgot=_outcome(list(losses.values())),
        less_on=tuple(item for item, sign in losses.items() if sign < 0),
        more_on=tuple(item for item, sign in losses.items() if sign > 0),
        details=tuple(_side_by_side(run, lora) + _against_scaled_lora(run, lora)),
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
    return (
        f"{len(verdicts)} comparisons with plain LoRA: the method did better in {better}, "
        f"plain LoRA in {worse}; {len(verdicts) - better - worse} within noise or a trade"
    )


def lora_words(lora: Run) -> str:
    """The baseline in a sentence: its label only where that says more than `LoRA`."""
    bare = lora.name.casefold() in {"lora", "plain lora"}
    return "plain LoRA" if bare else f"plain LoRA ({lora.name})"


def _clause(verdict: Verdict) -> str:
    """One verdict in words, with `_RUN` where the method's name belongs."""
    key, lora = (verdict.gain, verdict.forgot), lora_words(verdict.lora)
    if verdict.only_lora_gained:
        return f"{lora} did better than {_RUN} at learning: {_RUN} gained nothing significant"
    if key in _LORA_DID:
        return f"{lora} did better than {_RUN}: {_LORA_DID[key]}"
    if key in _METHOD_DID:
        return f"{_RUN} {_METHOD_DID[key].replace('{lora}', lora)}"
    parts = [_GAINED[verdict.gain]] if verdict.gain != "unknown" else []
    if verdict.forgot == "mixed":
        less = join_words([one_line(i) for i in verdict.less_on])
        more = join_words([one_line(i) for i in verdict.more_on])
        parts.append(f"forgot less on {less} but more on {more}")
    elif verdict.forgot != "unknown":
        same = verdict.forgot == "same"
        parts.append("forgot as much, within noise" if same else f"forgot {verdict.forgot}")
    words = " and ".join(parts) or "was measured on nothing that both have"
    return f"{_RUN}, against {lora}, {words}"


def _gain(report: EvaluationReport, item: str, metric: str) -> Estimate | None:
    result = metric_of(report, item, "gain", metric)
    return improvement(result) if result else None


def _loss(report: EvaluationReport, item: str, metric: str) -> Estimate | None:
    result = metric_of(report, item, "retention", metric)
    return loss(result) if result else None


def _compare(ours: Estimate | None, theirs: Estimate | None) -> int:
    if ours is None or theirs is None or min(ours.n, theirs.n) <= 1:
        return 0
    return (ours.low > theirs.high) - (ours.high < theirs.low)


def _outcome(signs: Sequence[int]) -> Outcome:
    if not signs:
        return "unknown"
    up, down = any(s > 0 for s in signs), any(s < 0 for s in signs)
    return "mixed" if up and down else "more" if up else "less" if down else "same"


def _side_by_side(run: Run, lora: Run) -> list[str]:
    words = []
    for item in items_of([run, lora], "retention"):
        metric = retention_metric([run, lora], item)
        ours, theirs = (_loss(r.record.evaluation, item, metric or "") for r in (run, lora))
        if metric == "kl" and ours and theirs and 0 < ours.mean < theirs.mean < math.inf:
            times = theirs.mean / ours.mean
            factor = f"{times:.0f}" if times >= 9.95 else f"{times:.1f}"
            words.append(f"{one_line(item)} {factor} times less" if times >= 1.05 else "")
        elif metric == "kl" and ours and theirs:
            words.append(f"{one_line(item)} {plain(ours.mean)} against {plain(theirs.mean)}")
    words = [w for w in words if w]
    return [f"KL to the base, {run.name} against {lora.name}: {', '.join(words)}."] if words else []


def _against_scaled_lora(run: Run, lora: Run) -> list[str]:
    """What plain LoRA, scaled down to the same gain, would have cost: the free alternative."""
    reports = sorted([*lora.record.scaled, lora.record.evaluation], key=lambda r: r.scale)
    if len(reports) < 2:
        return []
    for item in items_of([run, lora], "gain"):
        for metric in dict.fromkeys([gain_metric([run, lora], item) or "nll", "nll"]):
            ours = _gain(run.record.evaluation, item, metric)
            gains = [_gain(report, item, metric) for report in reports]
            if ours is None or any(g is None for g in gains):
                continue
            path = [0.0, *(g.mean for g in gains if g is not None)]
            return _matched(run, lora, reports, path, ours.mean, f"{metric_name(metric)} gain")
    return []


def _matched(
    run: Run,
    lora: Run,
    reports: Sequence[EvaluationReport],
    gains: list[float],
    target: float,
    gain: str,
) -> list[str]:
    if not target > 0:
        return []
    reached = [i for i in range(1, len(gains)) if gains[i - 1] < target <= gains[i]]
    if not reached:
        return [f"No scale of {lora.name} reaches the {gain} of {run.name}."]
    step = reached[0]
    share = (target - gains[step - 1]) / (gains[step] - gains[step - 1])
    words, worse = [], 0
    for item in items_of([run, lora], "retention"):
        kls = [metric_of(report, item, "retention", "kl") for report in reports]
        ours = metric_of(run.record.evaluation, item, "retention", "kl")
        if ours is None or any(k is None for k in kls):
            continue
        path = [0.0, *(k.tuned.mean for k in kls if k is not None)]
        cost = path[step - 1] + share * (path[step] - path[step - 1])
        worse += cost <= ours.tuned.mean
        words.append(f"{plain(cost)} on {one_line(item)} (against {plain(ours.tuned.mean)})")
    if not words:
        return []
    verdict = (
        f" Scaling it down does as well or better on {worse} of {len(words)}." if worse else ""
    )
    return [
        f"{lora.name} scaled down to the same {gain} has KL {', '.join(words)}; point estimates, "
        f"interpolated.{verdict}"
    ]
