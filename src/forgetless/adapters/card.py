"""The model card of an adapter folder: README.md with front matter, as model hubs read it.

It names a local base by its folder's name only, and holds no rows of data and no generated text but
samples that were asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import yaml

from forgetless.adapters.load import read_adapter_config
from forgetless.adapters.public_names import base_label, is_local_base, public_recipe
from forgetless.atomic import write_atomically
from forgetless.errors import AdapterError
from forgetless.escaping import markdown_code, markdown_text
from forgetless.methods import method_options
from forgetless.methods.base import AnyMethod

CARD = "README.md"
TAG = "forgetless"
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


# Which samples a card shows: `shareable` leaves out `self` data and sets not to be passed on.
Samples = Literal["none", "shareable", "all"]


@dataclass(frozen=True, slots=True)
class CardSample:
    """A prompt, and what base and tuned model wrote.

    Attributes:
        item: Of which evaluation item.
        prompt: Its text.
        base: The base model's answer.
        tuned: The tuned model's.
        can_be_shared: Whether its set may be passed on, and is not the model's own text.
    """

    item: str
    prompt: str
    base: str
    tuned: str
    can_be_shared: bool


@dataclass(frozen=True, slots=True)
class CardFigures:
    """What an evaluation contributes.

    Attributes:
        table: Gain and retention in Markdown, escaped.
        samples: All there are; a card shows those that were asked for.
        scale: Factor on ΔW at which they were measured.
    """

    table: str
    samples: tuple[CardSample, ...] = ()
    scale: float = 1.0

    def chosen(self, samples: Samples) -> tuple[CardSample, ...]:
        """Those that may be shown.

        Raises:
            AdapterError: No such choice.
        """
        if samples not in get_args(Samples):
            raise AdapterError(
                f"samples: expected one of {', '.join(get_args(Samples))}, got {samples!r}; "
                "shareable leaves out self data and sets that are not redistributable"
            )
        if samples == "none":
            return ()
        return tuple(s for s in self.samples if s.can_be_shared or samples == "all")


class Evaluated(Protocol):
    """What `forgetless.evaluate` returns, as far as a card looks at it."""

    def card_figures(self) -> CardFigures:
        """Table and samples."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What is known of an adapter beside its own files; any of it may be missing.

    Attributes:
        base: The base model as the user named it; else the adapter's configuration tells.
        quantization: How the base was quantised where the adapter was trained; None where not.
        method: How it was started.
        recipe: The resolved recipe that it was trained by, as plain values.
        figures: Gain and retention as a Markdown table, escaped.
        samples: Generated texts to show.
        notes: Sentences on how these figures are to be read.
        trained: Steps, rate and seed, in one line.
        made: When and with what it was made, in one line.
        library: Which library loads it, for the front matter; PEFT or transformers where empty.
        tags: Further tags.
        loading: Python that loads it; that of PEFT or transformers where empty.
    """

    base: str | None = None
    quantization: str | None = None
    method: AnyMethod | None = None
    recipe: Mapping[str, Any] | None = None
    figures: str = ""
    samples: tuple[CardSample, ...] = ()
    notes: tuple[str, ...] = ()
    trained: str = ""
    made: str = ""
    library: str = ""
    tags: tuple[str, ...] = ()
    loading: str = ""

    @property
    def is_full(self) -> bool:
        """Whether every weight was trained: there never was an adapter."""
        return self.method is not None and self.method.form == "full"


def write_card(
    folder: Path, facts: CardFacts, *, config: Mapping[str, Any] | None = None, merged: bool = False
) -> Path:
    """Write, or replace, the card of a folder; a reader sees the whole of it or the old one.

    Args:
        folder: An adapter's, or that of a merged model.
        facts: What is known.
        config: The adapter's configuration; that in the folder by default.
        merged: Whether the folder holds a whole model.

    Raises:
        AdapterError: No configuration is given, and none lies in the folder.
    """
    values = read_adapter_config(folder) if config is None else config
    return write_atomically(folder / CARD, card_text(values, facts, merged=merged))


def card_text(config: Mapping[str, Any], facts: CardFacts, *, merged: bool = False) -> str:
    """The card of an adapter, or of a model with its update merged in.

    Args:
        config: The adapter's configuration, as `adapter_config.json` holds it.
        facts: What else is known.
        merged: Whether the card is for a whole model.
    """
    name = str(facts.base or config.get("base_model_name_or_path") or "")
    is_local, base = is_local_base(name), base_label(name)
    kind = "Merged model" if merged else "LoRA adapter"
    kind = "Fully fine-tuned model" if facts.is_full else kind
    shown = f"{base} (a local model)" if is_local else base
    parts = [
        _front_matter("" if is_local else base, config, facts, merged),
        f"# {kind} for {markdown_text(shown) or 'an unnamed base model'}",
        _what(shown, config, facts, merged),
    ]
    if facts.figures:
        legend = (
            "Base and tuned model on held-out rows; in brackets the change from the base and its "
            "95 % interval, paired by row."
        )
        known = facts.quantization
        base_note = [f"Both were measured on the base quantised ({known})."] if known else []
        notes = " ".join([legend, *map(markdown_text, [*base_note, *facts.notes])])
        parts += ["## Gain and retention", notes, facts.figures.strip()]
    if facts.samples:
        parts += ["## Samples", *map(_sample, facts.samples)]
    # A folder's bare name would be looked up on the hub.
    loading = facts.loading or _loading(f"path/to/{base}" if is_local else base, config, merged)
    parts += ["## Loading", markdown_code(loading, "python")]
    if facts.recipe is not None:
        text = yaml.safe_dump(public_recipe(facts.recipe), sort_keys=False, allow_unicode=True)
        parts += ["## Recipe", markdown_code(text, "yaml")]
    if facts.method is not None:
        parts += ["## Citation", markdown_code("\n\n".join(facts.method.bibtex), "bibtex")]
    return "\n\n".join(parts) + "\n"


def is_own_card(path: Path) -> bool:
    """Whether a model card is one that forgetless wrote, edited since or not: it has our tag."""
    tags = front_matter(path).get("tags")
    return isinstance(tags, list) and TAG in tags


def front_matter(path: Path) -> dict[str, Any]:
    """What stands at the head of a model card; empty where there is none, or no mapping."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _FRONT_MATTER.match(text)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _front_matter(base: str, config: Mapping[str, Any], facts: CardFacts, merged: bool) -> str:
    method = [facts.method.name] if facts.method else []
    tags = [*([] if facts.is_full else ["lora"]), TAG, *facts.tags, *method]
    relation = "finetune" if merged else "adapter"
    values = {
        **({"base_model": base, "base_model_relation": relation} if base else {}),
        "library_name": facts.library or ("transformers" if merged else "peft"),
        "pipeline_tag": "text2text-generation" if _is_seq2seq(config) else "text-generation",
        "tags": list(dict.fromkeys(tags)),
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _what(base: str, config: Mapping[str, Any], facts: CardFacts, merged: bool) -> str:
    layers = config.get("target_modules") or ()
    named = ", ".join(sorted(layers)) if not isinstance(layers, str) else layers
    revision = f", revision {config['revision']}" if config.get("revision") else ""
    quantised = f"; trained on it quantised ({facts.quantization})" if facts.quantization else ""
    update = (
        f"{'merged from a ' if merged else ''}LoRA of rank {config.get('r')}, alpha "
        f"{config.get('lora_alpha')}, on {markdown_text(named)}"
    )
    lines = [
        f"- Base model: {markdown_text((base or 'not recorded') + revision + quantised)}",
        f"- Update: {'every weight, in float32' if facts.is_full else update}",
    ]
    if facts.method is not None:
        options = method_options(facts.method).items()
        chosen = ", ".join(f"{k} {v}" for k, v in options if k != "name" and v is not None)
        named = ", ".join(filter(None, [facts.method.name, chosen]))
        lines += [
            f"- Method: {named} ({facts.method.paper})",
            f"- What it does: {markdown_text(facts.method.title)}",
            f"- What it promises: {markdown_text(facts.method.promise)}",
        ]
    if facts.trained:
        lines.append(f"- Trained: {markdown_text(facts.trained)}")
    lines.append(f"- Made with forgetless{markdown_text(facts.made and f': {facts.made}')}")
    return "\n".join(lines)


def _sample(sample: CardSample) -> str:
    texts = {"Prompt": sample.prompt, "Base": sample.base, "Tuned": sample.tuned}
    blocks = [f"{name}:\n\n{markdown_code(text)}" for name, text in texts.items()]
    return "\n\n".join([f"**{markdown_text(sample.item)}**", *blocks])


def _loading(base: str, config: Mapping[str, Any], merged: bool) -> str:
    """Python that loads the folder; a local base has to be named anew."""
    kind = "AutoModelForSeq2SeqLM" if _is_seq2seq(config) else "AutoModelForCausalLM"
    if merged:
        return (
            f"from transformers import AutoTokenizer, {kind}\n\n"
            f'model = {kind}.from_pretrained("this-folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("this-folder")'
        )
    revision = f", revision={config['revision']!r}" if config.get("revision") else ""
    return (
        "from peft import PeftModel\n"
        f"from transformers import AutoTokenizer, {kind}\n\n"
        f"base = {kind}.from_pretrained({base!r}{revision})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base!r}{revision})\n"
        'model = PeftModel.from_pretrained(base, "this-folder")'
    )


def _is_seq2seq(config: Mapping[str, Any]) -> bool:
    return str(config.get("task_type")).endswith("SEQ_2_SEQ_LM")
