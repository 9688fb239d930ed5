"""What an evaluation returns: plain values that go into the record as they stand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from forgetless.adapters.card import CardFigures
from forgetless.evaluation.as_card import card_figures
from forgetless.evaluation.as_text import report_text

Side = Literal["gain", "retention"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Value):
    """A mean over rows with its 95 % interval; `low` = `high` = `mean` where `n` is 1.

    For NLL, KL and F1 the wider of bootstrap-t and Student's, which covers 0 where `n` is below 6;
    Wilson's interval for shares of rows, and for their paired changes one that is significant only
    where the exact test of McNemar is.
    """

    mean: float
    low: float
    high: float
    n: int


class MetricResult(_Value):
    """One metric on one item: the base, the tuned model, and the change paired by row.

    `base` and `change` are None for `kl`, which is a comparison itself. `change` is tuned minus
    base. For `nll` and `kl` the mean is over scored tokens and the bootstrap resamples rows.
    """

    metric: str
    base: Estimate | None
    tuned: Estimate
    change: Estimate | None
    higher_is_better: bool


class RowValues(_Value):
    """One metric row by row, so that two adapters measured on the same rows can be paired.

    Attributes:
        base: The base's figure of each scored row; empty for `kl`.
        tuned: The tuned model's.
        weights: Scored tokens of each row, for means per token; empty where rows count equally.
    """

    base: tuple[float, ...] = ()
    tuned: tuple[float, ...]
    weights: tuple[float, ...] = ()


class Sample(_Value):
    """One prompt with what base and tuned model generate for it.

    `base_right` and `tuned_right` are None where no metric judges the text.
    """

    prompt: str
    reference: str
    base: str
    tuned: str
    base_right: bool | None = None
    tuned_right: bool | None = None


class HitLimit(_Value):
    """How many generated answers the limit cut off: `max_new_tokens`, and no end of the answer."""

    base: int
    tuned: int


class TaskFacts(_Value):
    """What lm-eval asked, and how: the prompt template alone moves a score by many points.

    Attributes:
        task: Its name in lm-eval; the group's where it is a mean over all its tasks.
        version: Of the task; empty where it has none.
        lm_eval: Version of lm-eval.
        config_hash: Of the task's whole configuration, but for where its data lie.
        rows_hash: Of all prompts and targets.
        num_fewshot: Solved examples before each question.
        limit: The first rows only; None for all.
        chat_template: Whether prompts went through the tokenizer's chat template.
        description: Text before the examples.
        doc_to_text: Template of a question.
        doc_to_target: Template of what is right.
        generation: Settings of the generation, as JSON; empty where nothing is generated.
        filters: How the answer is taken from the text, by metric.
    """

    task: str
    version: str
    lm_eval: str
    config_hash: str
    rows_hash: str
    num_fewshot: int
    limit: int | None
    chat_template: bool
    description: str
    doc_to_text: str
    doc_to_target: str
    generation: str
    filters: dict[str, str] = {}

    def __str__(self) -> str:
        """One line on what was asked."""
        template = repr(self.description + self.doc_to_text)
        shots = f"{self.num_fewshot} examples" if self.num_fewshot != 1 else "1 example"
        limit = f", the first {self.limit} rows" if self.limit is not None else ""
        chat = ", in the chat template" if self.chat_template else ""
        version = f" version {self.version}" if self.version else ""
        return (
            f"lm-eval {self.lm_eval}, {self.task}{version}, {shots}{limit}{chat}, prompt {template}"
        )


class ItemResult(_Value):
    """All metrics of one evaluation item.

    In older records `row_values` is empty and `hit_limit` None, as where no metric generates.
    `lm_eval` is None where the item is none of its tasks.
    `samples_can_be_shared` is False for `self` data and sets that must not be passed on, and in
    records that do not tell: a model card then holds no sample of the item unless asked for.
    """

    name: str
    side: Side
    rows: int
    truncated_rows: int
    metrics: dict[str, MetricResult]
    samples: tuple[Sample, ...] = ()
    row_values: dict[str, RowValues] = {}
    hit_limit: HitLimit | None = None
    lm_eval: TaskFacts | None = None
    samples_can_be_shared: bool = False


class LayerMovement(_Value):
    """How far one adapted layer moved. All are fractions without unit.

    Attributes:
        update_size: F_Δ, mean over tokens of ‖ΔW x‖ / ‖x‖ on held-out inputs of the base.
        drift: tr(ΔW M ΔWᵀ) / tr(W M Wᵀ), M a held-out preserve second moment of the base.
        drift_calibration: The same on the calibration moment; None without one.
        drift_bound: What `drift_calibration` cannot exceed at this ‖ΔW‖, whatever B became; None
            where A trains, or without a calibration moment.
        leakage: (d/r)·tr(Uᵀ M U)/tr(M), U an orthonormal basis of A's row space, M held out. None
            where a change of whole weights has no direction that stands out of their rounding.
        relative_norm: ‖ΔW‖_F / ‖W‖_F.
    """

    update_size: float
    drift: float
    drift_calibration: float | None
    drift_bound: float | None = None
    leakage: float | None
    relative_norm: float

    def scaled(self, scale: float) -> LayerMovement:
        """The same layer with ΔW times `scale`, which is exact: nothing needs to be measured."""
        return LayerMovement(**_scaled(self, scale))


class Movement(_Value):
    """Means over adapted layers, and each layer."""

    update_size: float
    drift: float
    drift_calibration: float | None
    drift_bound: float | None = None
    leakage: float | None
    relative_norm: float
    layers: dict[str, LayerMovement]

    def scaled(self, scale: float) -> Movement:
        """The same adapter with ΔW times `scale`, which is exact: nothing needs to be measured."""
        layers = {name: layer.scaled(scale) for name, layer in self.layers.items()}
        return Movement(**_scaled(self, scale), layers=layers)


def _scaled(moved: LayerMovement | Movement, scale: float) -> dict[str, float | None]:
    """Sizes go with |scale|, drift with its square; leakage asks for A's row space only."""
    size, square = abs(scale), scale**2
    calibration, bound = moved.drift_calibration, moved.drift_bound
    return {
        "update_size": moved.update_size * size,
        "drift": moved.drift * square,
        "drift_calibration": None if calibration is None else calibration * square,
        "drift_bound": None if bound is None else bound * square,
        "leakage": moved.leakage,
        "relative_norm": moved.relative_norm * size,
    }


class EvaluationReport(_Value):
    """Gain and retention of one adapter against its base; `scale` is the factor on ΔW."""

    items: tuple[ItemResult, ...]
    movement: Movement | None = None
    scale: float = 1.0
    seconds: float = 0.0

    def card_figures(self) -> CardFigures:
        """What a model card tells of it."""
        return card_figures(self)

    def __str__(self) -> str:
        """A table in plain text, at most 80 columns wide."""
        return report_text(self)
