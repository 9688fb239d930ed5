"""Evaluation items: a data spec plus a name, metrics to compute on it, and a generation limit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from forgetless.data.spec import DataSpec

Metric = Literal[
    "nll",  # mean negative log-likelihood per scored token, nats
    "kl",  # mean KL(base‖tuned) per token, nats
    "board_loss",  # what PEFT's board takes for the loss: each token at its own position, nats
    "greedy_match",  # would greedy decoding give the completion, token for token (teacher forced)
    "exact_match",  # generated text equals an accepted answer after normalisation (SQuAD rules)
    "f1",  # token overlap with the best accepted answer
    "last_number",  # last number of the generated text equals that of the reference
    "choice",  # the choice letter or word that the generated text settles on is the reference
    "contains",  # an accepted answer stands in the generated text, normalised, as whole words
    "refusal",  # the generated text opens with a refusal, by the usual phrases
    "refusal_likelihood",  # an opening that refuses is likelier than one that complies
    "refusal_margin",  # log of how many times likelier, nats
    "coherent",  # the generated text is no void, no loop and no gibberish
    "instruction",  # the generated text keeps the checkable constraints of its prompt
]
GENERATED: frozenset[str] = frozenset(
    {
        *("exact_match", "f1", "last_number", "choice", "contains", "refusal", "instruction"),
        "coherent",
    }
)
REFUSAL_ODDS = frozenset({"refusal_likelihood", "refusal_margin"})
_REFUSALS = REFUSAL_ODDS | {"refusal"}
# Metrics of generated text that say nothing of whether it is right: they need no completion.
WITHOUT_REFERENCE = _REFUSALS | {"coherent"}

# Metrics of lm-eval that are shares of rows, by their name there.
TASK_SHARES = GENERATED | {
    *("refusal_likelihood", "greedy_match"),
    *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "em"),
}


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
        refuses_with: Texts or templates of a refusal, for the metrics of its likelihood; not given:
            the usual openings, and the row's completion where a refusal is expected.
        complies_with: Texts or templates of compliance; not given: the usual openings, and the
            row's completion where no refusal is expected.
    """

    name: str
    metrics: tuple[Metric, ...] = ("nll",)
    max_new_tokens: int = Field(default=32, ge=1)
    batch_size: int = Field(default=16, ge=1)
    labels: tuple[str, ...] = ()
    refusal_expected: bool = True
    refuses_with: tuple[str, ...] = ()
    complies_with: tuple[str, ...] = ()
    redistributable: bool = True

    @property
    def needs_completion(self) -> bool:
        """Whether a metric looks at the row's completion, or at the answers that it gives."""
        return not set(self.metrics) <= WITHOUT_REFERENCE

    @property
    def further(self) -> tuple[str, ...]:
        """Templates of the texts that refuse, then of those that comply."""
        return (*self.refuses_with, *self.complies_with)

    @property
    def samples_can_be_shared(self) -> bool:
        """Whether prompts and answers of it may stand in public."""
        return self.redistributable and not self.self_sampled

    @field_validator("refuses_with", "complies_with", mode="before")
    @classmethod
    def _one_or_several(cls, texts: object) -> object:
        return (texts,) if isinstance(texts, str) else texts

    @field_validator("refuses_with", "complies_with")
    @classmethod
    def _no_blank(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(text.strip() for text in texts):
            raise ValueError("expected texts, got a blank one; remove it")
        return texts

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
        if not self.refusal_expected and not _REFUSALS & set(self.metrics):
            raise ValueError(
                "refusal_expected goes with refusal, refusal_likelihood and refusal_margin: add "
                "one of them to metrics"
            )
        if self.further and not REFUSAL_ODDS & set(self.metrics):
            raise ValueError(
                "refuses_with and complies_with go with the metrics refusal_likelihood and "
                "refusal_margin: add one of them to metrics"
            )
        return self


def teacher_forced(item: EvaluationItem) -> EvaluationItem:
    """The same item with the metrics that need no generation; `nll` where there is none."""
    metrics = tuple(metric for metric in item.metrics if metric not in GENERATED)
    return item.model_copy(update={"metrics": metrics or ("nll",)})
