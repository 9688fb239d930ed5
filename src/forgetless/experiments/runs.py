"""Records as the report sees them: each under one name, and the metrics it shows in one order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.escaping import one_line
from forgetless.evaluation.items import GENERATED
from forgetless.evaluation.results import Estimate, EvaluationReport, MetricResult, Side
from forgetless.experiments.numbers import is_share, join_words
from forgetless.experiments.record import Record


@dataclass(frozen=True)
class Run:
    """One record, the name that every table and chart gives it, its place and its colour's class.

    Plain LoRA is drawn in grey, whatever its place: the ground that the others stand out from.
    """

    record: Record
    name: str
    index: int
    colour: str

    @property
    def is_lora(self) -> bool:
        """Whether this is plain LoRA, the baseline of every claim."""
        return is_plain_lora(self.record)


def is_plain_lora(record: Record) -> bool:
    """LoRA as everybody trains it: no regulariser, one rate for A and B."""
    return record.method.get("name") == "lora" and not beyond_the_loss(record)


def beyond_the_loss(record: Record) -> list[object]:
    """What a recipe adds to plain training: regularisers, LoRA+; nothing in older records."""
    training = record.recipe.get("training", {})
    found: list[object] = list(training.get("regularisers") or ())
    ratio = training.get("lora_plus_ratio")
    return found if ratio is None else [*found, {"lora_plus_ratio": ratio}]


def name_runs(records: Sequence[Record]) -> list[Run]:
    """Give every record a name of its own: its label, and more where labels repeat."""
    labels = _labels(records)
    total, seen = Counter(labels), Counter[str]()
    runs: list[Run] = []
    for index, (label, record) in enumerate(zip(labels, records, strict=True)):
        seen[label] += 1
        name = f"{label} ({seen[label]})" if total[label] > 1 else label
        lora = is_plain_lora(record)
        colour = "m-lora" if lora else f"m{sum(not run.is_lora for run in runs) % 8}"
        runs.append(Run(record, name, index, colour))
    return runs


def _labels(records: Sequence[Record]) -> list[str]:
    """Labels; with seed, or the output folder's name, or both, where they repeat."""
    labels = [one_line(r.label) or "run" for r in records]
    folders = [one_line(Path(str(r.recipe.get("output", ""))).name) for r in records]
    named = list(zip(labels, records, folders, strict=True))
    repeated = {label for label, found in Counter(labels).items() if found > 1}
    tries = (
        labels,
        [f"{label}, seed {r.seed}" if label in repeated else label for label, r, _ in named],
        [
            f"{label}, {folder}" if label in repeated and folder else label
            for label, _, folder in named
        ],
        [
            f"{label}, {folder}, seed {r.seed}" if label in repeated else label
            for label, r, folder in named
        ],
    )
    return next((names for names in tries if len(set(names)) == len(names)), labels)


def metric_of(report: EvaluationReport, item: str, side: Side, metric: str) -> MetricResult | None:
    """One figure of a report; None where the item or the metric was not measured."""
    for result in report.items:
        if result.name == item and result.side == side:
            return result.metrics.get(metric)
    return None


def measured(runs: Sequence[Run], side: Side) -> Iterator[tuple[str, str]]:
    """Every (item, metric) of a side that any run measured: items as met, KL and NLL first."""
    metrics: dict[str, dict[str, None]] = {}
    for run in runs:
        for item in run.record.evaluation.items:
            if item.side == side:
                metrics.setdefault(item.name, {}).update(dict.fromkeys(item.metrics))
    for name, found in metrics.items():
        for metric in sorted(found, key=lambda m: (m != "kl", m != "nll")):
            yield name, metric


def is_significant(change: Estimate | None) -> bool:
    """Whether the paired 95 % interval of a change is known and leaves out 0."""
    if change is None or change.n <= 1:
        return False
    if not (math.isfinite(change.low) and math.isfinite(change.high)):
        return False
    return change.low > 0 or change.high < 0


def improvement(result: MetricResult) -> Estimate | None:
    """The change with its sign turned so that more is better."""
    if result.change is None or result.higher_is_better:
        return result.change
    change = result.change
    return Estimate(mean=-change.mean, low=-change.high, high=-change.low, n=change.n)


def loss(result: MetricResult) -> Estimate | None:
    """What was lost on a retention metric, more is worse: KL itself, else the worsening."""
    if result.metric == "kl":
        return result.tuned
    better = improvement(result)
    if better is None:
        return None
    return Estimate(mean=-better.mean, low=-better.high, high=-better.low, n=better.n)


def gain_metric(runs: Sequence[Run], item: str) -> str | None:
    """The metric that stands for an item's gain: the first share, else NLL, that every run has.

    A share that is 0 in base and all runs tells nothing: NLL goes before it.
    """

    def order(metric: str) -> tuple[bool, ...]:
        return (is_share(metric) and _is_silent(runs, item, metric), not is_share(metric),
                metric != "nll")  # fmt: skip

    metrics = _shared_metrics(runs, item, "gain", key=order)
    return next((metric for metric in metrics if metric != "kl"), None)


def gains_of(run: Run) -> list[tuple[str, MetricResult]]:
    """Every gain item with its metric that stands for it first, then the others."""
    found = []
    for item in items_of([run], "gain"):
        chosen = gain_metric([run], item)
        metrics = [m for name, m in measured([run], "gain") if name == item and m != "kl"]
        for metric in sorted(metrics, key=lambda m: m != chosen):
            result = metric_of(run.record.evaluation, item, "gain", metric)
            if result is not None:
                found.append((item, result))
    return found


def has_improved(result: MetricResult) -> bool:
    """Whether a metric became better by more than its paired interval hides."""
    better = improvement(result)
    return better is not None and is_significant(better) and better.low > 0


def has_gained(run: Run) -> bool:
    """Whether any gain metric of a run improved significantly."""
    return any(has_improved(result) for _, result in gains_of(run))


def kl_floor(run: Run) -> float:
    """KL below this is rounding: about 0.003 nats where the base computes in 16 bits, else 0."""
    return 0.003 if run.record.model.dtype in ("bfloat16", "float16") else 0.0


def _is_silent(runs: Sequence[Run], item: str, metric: str) -> bool:
    results = [metric_of(run.record.evaluation, item, "gain", metric) for run in runs]
    return all(
        r is None or (r.tuned.mean == 0 and (r.base is None or r.base.mean == 0)) for r in results
    )


def retention_metrics(runs: Sequence[Run], item: str) -> list[str]:
    """The metrics of an item's forgetting that every run has: KL, NLL, then the others."""
    return _shared_metrics(
        runs, item, "retention", key=lambda metric: (metric != "kl", metric != "nll")
    )


def _shared_metrics(
    runs: Sequence[Run], item: str, side: Side, *, key: Callable[[str], tuple[bool, ...]]
) -> list[str]:
    found = []
    for metric in sorted((m for name, m in measured(runs, side) if name == item), key=key):
        results = [metric_of(run.record.evaluation, item, side, metric) for run in runs]
        if all(r is not None and loss(r) is not None for r in results):
            found.append(metric)
    return found


def items_of(runs: Sequence[Run], side: Side) -> list[str]:
    """Names of the items of a side, as first met."""
    return list(dict.fromkeys(name for name, _ in measured(runs, side)))


def not_comparable(runs: Sequence[Run]) -> list[str]:
    """Why these runs cannot be held against each other; empty where they can."""
    reasons = []
    if len({run.record.model.fingerprint for run in runs}) > 1:
        reasons.append(_models_differ(runs))
    if _differ({d.fingerprint for d in r.record.data if d.role == "train"} for r in runs):
        reasons.append("the train rows differ")
    for side in ("gain", "retention"):
        for item in items_of(runs, side):
            if _differ(rows_asked(run, item) for run in runs):
                reasons.append(f"the rows of {one_line(item)} differ")
            if _differ(_task_settings(run, item) for run in runs):
                reasons.append(f"lm-eval asked {one_line(item)} in another way")
            if _differ(_generation_limits(run, side, item) for run in runs):
                reasons.append(f"max_new_tokens of {one_line(item)} differs")
    return list(dict.fromkeys(reasons))


def rows_asked(run: Run, item: str) -> set[str]:
    """Fingerprints of an item's rows; of a task's, which lm-eval reads, its prompts."""
    return {d.fingerprint for d in run.record.data if d.role == item} | {
        i.lm_eval.rows_hash
        for i in run.record.evaluation.items
        if i.name == item and i.lm_eval is not None
    }


def task_lines(reports: Sequence[EvaluationReport]) -> list[str]:
    """What lm-eval asked for each of its items, and how, each once."""
    return list(
        dict.fromkeys(
            f"{one_line(item.name)}: {one_line(str(item.lm_eval))}"
            for report in reports
            for item in report.items
            if item.lm_eval is not None
        )
    )


def _task_settings(run: Run, item: str) -> set[Any]:
    return {
        (i.lm_eval.config_hash, i.lm_eval.lm_eval)
        for i in run.record.evaluation.items
        if i.name == item and i.lm_eval is not None
    }


def _differ(known: Iterable[set[Any]]) -> bool:
    """Whether runs disagree; a record that does not tell agrees with all."""
    return len({frozenset(values) for values in known if values}) > 1


def _generation_limits(run: Run, side: Side, item: str) -> set[Any]:
    """`max_new_tokens` of an item whose answers are generated."""
    result = next(
        (i for i in run.record.evaluation.items if (i.name, i.side) == (item, side)), None
    )
    if result is None or not GENERATED & set(result.metrics):
        return set()
    items = run.record.recipe.get("evaluation", {}).get(side, [])
    return {i["max_new_tokens"] for i in items if i.get("name") == item and "max_new_tokens" in i}


def _models_differ(runs: Sequence[Run]) -> str:
    """How: the same model in another dtype or quantisation is another base, not another model."""
    models = [run.record.model for run in runs]
    alike = {(m.name, m.revision, m.architecture, m.parameters) for m in models}
    dtypes = list(dict.fromkeys(m.dtype for m in models))
    kinds = list(dict.fromkeys(m.quantization or "full precision" for m in models))
    if len(alike) == 1 and len(kinds) > 1:
        return f"the base model was loaded in {join_words(kinds)}"
    if len(alike) == 1 and len(dtypes) > 1:
        return f"the base model was loaded in {join_words(dtypes)}"
    return "the base models differ"
