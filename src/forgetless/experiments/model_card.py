"""What a run's record contributes to the model card of its adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from forgetless.adapters.card import CardFacts, Samples, write_card
from forgetless.adapters.compress import Compression
from forgetless.adapters.gguf.files import GGUF
from forgetless.adapters.gguf.target import write_gguf_card
from forgetless.adapters.load import CONFIG, read_adapter_config
from forgetless.adapters.public_names import public_name
from forgetless.errors import ArtefactError
from forgetless.evaluation.results import EvaluationReport, ItemResult
from forgetless.experiments.markdown import markdown_table
from forgetless.experiments.record import Record, load_record
from forgetless.methods import make_any_method

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
    if merged and record.model.quantization is not None:
        return replace(
            _without_figures(record),
            trained=f"{_trained(record)}; merged into the base in full precision, gain and "
            "retention not measured since",
        )
    measured = next((r for r in record.scaled if r.scale == scale), None)
    if scale != 1.0 and measured is None:
        notes.append(f"The update is scaled by {scale:g} here; the figures are those at scale 1.")
    if merged:
        notes.append("They were measured with the update beside the base, before it was merged.")
    shown = record.evaluation if measured is None or scale == 1.0 else measured
    label = record.label if shown is record.evaluation else f"{record.label}, scale {scale:g}"
    table = record.model_copy(update={"evaluation": _with_public_names(shown), "label": label})
    return replace(
        _without_figures(record),
        figures=markdown_table([table]) if shown.items else "",
        samples=record.evaluation.card_figures().chosen(samples) if scale == 1.0 else (),
        notes=tuple(notes),
    )


def _without_figures(record: Record) -> CardFacts:
    versions = [f"{n} {record.versions[n]}" for n in _SHOWN_VERSIONS if n in record.versions]
    # Only a local model has stamps; its name may be relative to a folder of then.
    base, recipe = record.model.name, record.recipe
    if record.model_files:
        base = str(Path(base).expanduser().absolute())
        recipe = {**recipe, "model": base}
    return CardFacts(
        base=base,
        quantization=record.model.quantization,
        method=make_any_method(record.method),
        recipe=recipe,
        trained=_trained(record),
        made=", ".join([record.created, *versions]),
    )


def _trained(record: Record) -> str:
    steps, rate = record.training.steps, record.training.learning_rate
    return f"{steps} steps at learning rate {rate:g}, seed {record.seed}"


def _with_public_names(report: EvaluationReport) -> EvaluationReport:
    """Items without the paths that they are named by, and still with names of their own."""
    items: list[ItemResult] = []
    seen: Counter[str] = Counter()
    for item in report.items:
        name = public_name(item.name)
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
        items.append(item.model_copy(update={"name": unique}))
    return report.model_copy(update={"items": tuple(items)})


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
        warn: Told of a record that cannot be read, which the card then does without, and of
            samples that were asked for and are not there.
    """
    facts = CardFacts(base=read_adapter_config(source).get("base_model_name_or_path"))
    record = source.parent / "record.json"
    if source.name == "adapter" and record.is_file():
        try:
            facts = card_facts(load_record(record), scale=scale, merged=merged, samples=samples)
        except ArtefactError as error:
            if warn is not None:
                warn(f"the model card has no figures: {error}")
    if base is not None:
        facts = replace(facts, base=base)
    if cut is not None:
        ranks = f"rank cut from {cut.rank_before} to {cut.rank}"
        words = f"{ranks}, gain and retention not measured since"
        facts = replace(
            facts, figures="", samples=(), trained="; ".join(filter(None, [facts.trained, words]))
        )
    if samples != "none" and not facts.samples and warn is not None:
        warn(
            f"the model card shows no samples, though {samples} were asked for: the adapter needs "
            "the record of its run beside it, and samples in it of this rank and scale that may be "
            "shown"
        )
    if (output / GGUF).is_file():
        write_gguf_card(output, facts)
        return
    config = None if (output / CONFIG).is_file() else read_adapter_config(source)
    write_card(output, facts, config=config, merged=merged)
