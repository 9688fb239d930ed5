"""What a run's record contributes to the model card of its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from forgetless.adapters.card import CardFacts, Samples, write_card
from forgetless.adapters.compress import Compression
from forgetless.adapters.gguf.files import GGUF
from forgetless.adapters.gguf.target import write_gguf_card
from forgetless.adapters.load import CONFIG, read_adapter_config
from forgetless.errors import ArtefactError
from forgetless.experiments.markdown import markdown_table
from forgetless.experiments.record import Record, load_record
from forgetless.methods import make_method

_SHOWN_VERSIONS = ("forgetless", "peft", "transformers", "torch")


def card_facts(
    record: Record, *, scale: float = 1.0, merged: bool = False, samples: Samples = "none"
) -> CardFacts:
    """Method, recipe and figures of a finished run.

    Args:
        record: The run's.
        scale: Factor on ΔW in what the card describes.
        merged: Whether the update is merged into the base there.
        samples: Which of the run's generated texts to show; they are those at scale 1.
    """
    notes = []
    measured = next((r for r in record.scaled if r.scale == scale), None)
    if scale != 1.0 and measured is None:
        notes.append(f"The update is scaled by {scale:g} here; the figures are those at scale 1.")
    if merged:
        notes.append("They were measured with the update beside the base, before it was merged.")
    shown = record
    if measured is not None and scale != 1.0:
        shown = record.model_copy(
            update={"evaluation": measured, "label": f"{record.label}, scale {scale:g}"}
        )
    versions = [f"{n} {record.versions[n]}" for n in _SHOWN_VERSIONS if n in record.versions]
    return CardFacts(
        base=record.model.name,
        method=make_method(record.method),
        recipe=record.recipe,
        figures=markdown_table([shown]) if shown.evaluation.items else "",
        samples=record.evaluation.card_figures().chosen(samples) if scale == 1.0 else (),
        notes=tuple(notes),
        trained=f"{record.training.steps} steps at learning rate "
        f"{record.training.learning_rate:g}, seed {record.seed}",
        made=", ".join([record.created, *versions]),
    )


def write_export_card(
    output: Path,
    source: Path,
    *,
    base: str | None = None,
    scale: float = 1.0,
    merged: bool = False,
    cut: Compression | None = None,
    samples: Samples = "none",
    warn: Callable[[str], None] | None = None,
) -> None:
    """Give an exported folder its card, with the figures of the run that the adapter came from.

    Args:
        output: What was exported.
        source: The adapter's folder; a record is looked for beside it.
        base: The base model where the user named one.
        scale: Factor on ΔW.
        merged: Whether `output` is a merged model.
        cut: What cutting the rank did; the run's figures are then not those of `output`.
        samples: Which of the run's generated texts the card shows.
        warn: Told of a record that cannot be read; the card then does without it.
    """
    facts = CardFacts(base=base)
    record = source.parent / "record.json"
    if source.name == "adapter" and record.is_file():
        try:
            facts = card_facts(load_record(record), scale=scale, merged=merged, samples=samples)
        except ArtefactError as error:
            if warn is not None:
                warn(f"the model card has no figures: {error}")
    if cut is not None:
        ranks = f"rank cut from {cut.rank_before} to {cut.rank}"
        words = f"{ranks}, gain and retention not measured since"
        facts = replace(
            facts, figures="", samples=(), trained="; ".join(filter(None, [facts.trained, words]))
        )
    if (output / GGUF).is_file():
        write_gguf_card(output, facts)
        return
    config = None if (output / CONFIG).is_file() else read_adapter_config(source)
    write_card(output, facts, config=config, merged=merged)
