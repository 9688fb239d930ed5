"""What training returns: plain values that go into the record as they stand."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LogPoint(_Part):
    """One logged training step; figures are means since the point before.

    Attributes:
        loss: Of the train rows (and of what is replayed) alone.
        terms: What each regulariser adds to it in what is minimised, by name.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None = None
    terms: dict[str, float] = {}


class TrainingFacts(_Part):
    """How training went. `validation_nll` is on rows held out of training, where there are any.

    Attributes:
        tokens: Tokens read, prompt and completion, padding not counted, over all epochs.
        resumed_from: Steps from which a killed run trained on, as far as checkpoints know; a run
            killed after its last step is not among them, as it repeats none.
    """

    learning_rate: float
    learning_rate_source: str
    steps: int
    epochs: float
    tokens: int
    trainable_parameters: int
    resumed_from: list[int]
    curve: list[LogPoint]
    validation_nll: float | None = None
