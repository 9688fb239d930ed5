"""Evaluation items: a data spec plus a name, metrics to compute on it, and a generation limit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from forgetless.data.spec import DataSpec

Metric = Literal[
    "nll",  # mean negative log-likelihood per scored token, nats
    "kl",  # mean KL(base‖tuned) per token, nats
    "greedy_match",  # would greedy decoding give the completion, token for token (teacher forced)
    "exact_match",  # generated text equals an accepted answer after normalisation (SQuAD rules)
    "f1",  # token overlap with the best accepted answer
    "last_number",  # last number of the generated text equals that of the reference
    "choice",  # the choice letter or word that the generated text settles on is the reference
    "contains",  # an accepted answer stands in the generated text, normalised, as whole words
    "refusal",  # the generated text opens with a refusal, by the usual phrases
    "instruction",  # the generated text keeps the checkable constraints of its prompt
]
GENERATED: frozenset[str] = frozenset(
    {"exact_match", "f1", "last_number", "choice", "contains", "refusal", "instruction"}
)

# Metrics of lm-eval that are shares of rows, by their name there.
TASK_SHARES = GENERATED | {"greedy_match", "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "em"}


class EvaluationItem(DataSpec):
    """What to measure on one held-out set.

    Attributes:
        name: Name in the record and the report.
        metrics: Which metrics; `nll` alone by default, `nll` and `kl` for retention in a recipe.
        max_new_tokens: Generation limit of the metrics that generate.
        batch_size: Rows a forward pass.
        labels: Every answer that may be given, for `contains`: a text that names a wrong one
            beside the right one counts as wrong.
        redistributable: Whether rows of this set may be passed on. Where not, and for `self` data,
            a model card shows no samples of it unless they are asked for.
        refusal_expected: Whether the prompts ought to be refused. False for harmless ones: fewer
            refusals are then better.
    """

    name: str
    metrics: tuple[Metric, ...] = ("nll",)
    max_new_tokens: int = Field(default=32, ge=1)
    batch_size: int = Field(default=16, ge=1)
    labels: tuple[str, ...] = ()
    refusal_expected: bool = True
    redistributable: bool = True

    @property
    def needs_completion(self) -> bool:
        """Whether a metric looks at the row's completion, or at the answers that it gives."""
        return set(self.metrics) != {"refusal"}

    @property
    def samples_can_be_shared(self) -> bool:
        """Whether prompts and answers of it may stand in public."""
        return self.redistributable and not self.self_sampled

    @field_validator("metrics")
    @classmethod
    def _some(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if not metrics:
            raise ValueError("expected at least one metric")
        return tuple(dict.fromkeys(metrics))

    @model_validator(mode="after")
    def _options_have_their_metric(self) -> EvaluationItem:
        if self.labels and "contains" not in self.metrics:
            raise ValueError("labels goes with the metric contains: add it to metrics")
        if not self.refusal_expected and "refusal" not in self.metrics:
            raise ValueError("refusal_expected goes with the metric refusal: add it to metrics")
        return self


def teacher_forced(item: EvaluationItem) -> EvaluationItem:
    """The same item with the metrics that need no generation; `nll` where there is none."""
    metrics = tuple(metric for metric in item.metrics if metric not in GENERATED)
    return item.model_copy(update={"metrics": metrics or ("nll",)})
