"""What plain LoRA, scaled down to a method's gain, would have forgotten: the free alternative.

Between two measured scales the root of KL is interpolated, linear in the gain: KL grows about as
the square of the scale, so that KL itself would be overstated between them, to plain LoRA's harm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from forgetless.escaping import one_line
from forgetless.evaluation.results import Estimate, EvaluationReport
from forgetless.experiments.contrasts import contrast
from forgetless.experiments.numbers import metric_name, plain
from forgetless.experiments.runs import Run, gain_metric, improvement, items_of, metric_of


def against_scaled_lora(run: Run, lora: Run) -> list[str]:
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
            found = contrast(run, lora, item, "gain", metric)
            # Where rows cannot tell the gains apart, LoRA as it is stands at the method's gain.
            apart = found is None or found.sign != 0
            target = ours.mean if apart else min(ours.mean, path[-1])
            return _matched(run, lora, reports, path, target, f"{metric_name(metric)} gain")
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
        scales = ", ".join(f"{report.scale:g}" for report in reports)
        return [
            f"None of the measured scales of {lora.name} ({scales}) reaches the {gain} "
            f"of {run.name}."
        ]
    step = reached[0]
    share = (target - gains[step - 1]) / (gains[step] - gains[step - 1])
    words, worse = [], 0
    for item in items_of([run, lora], "retention"):
        kls = [metric_of(report, item, "retention", "kl") for report in reports]
        ours = metric_of(run.record.evaluation, item, "retention", "kl")
        if ours is None or any(k is None for k in kls):
            continue
        path = [0.0, *(math.sqrt(max(k.tuned.mean, 0)) for k in kls if k is not None)]
        cost = (path[step - 1] + share * (path[step] - path[step - 1])) ** 2
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


def _gain(report: EvaluationReport, item: str, metric: str) -> Estimate | None:
    result = metric_of(report, item, "gain", metric)
    return improvement(result) if result else None
