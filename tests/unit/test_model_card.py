"""The model card, read back with yaml and a small reader of Markdown fences."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import forgetless
from forgetless.adapters.card import CARD, CardFacts, card_text, write_card
from forgetless.adapters.public_names import base_label, public_name
from forgetless.errors import AdapterError
from forgetless.evaluation.items import EvaluationItem
from forgetless.evaluation.results import Sample
from forgetless.experiments.model_card import card_facts, write_export_card
from forgetless.experiments.record import Record, save_record
from forgetless.methods import METHODS, make_method
from report_records import realistic_records
from training_setup import adapted

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "revision": "abc123",
    "r": 8,
    "lora_alpha": 8,
    "target_modules": ["v_proj", "q_proj"],
}
HOSTILE = 'x</script>\n---\nlicense: evil\n# Owned\n```\n[a](http://b) | c "d": *e* \x1b[31m'


def front_matter(card: str) -> dict[str, Any]:
    """What stands between the first two rules."""
    _, matter, _ = card.split("---\n", 2)
    loaded = yaml.safe_load(matter)
    assert isinstance(loaded, dict)
    return loaded


def fences(card: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block, by CommonMark's rule for its end."""
    found, lines = [], iter(card.splitlines())
    for line in lines:
        opened = re.fullmatch(r"(`{3,})(\w*)", line)
        if opened:
            content = []
            for inner in lines:
                if re.fullmatch(rf"`{{{len(opened[1])},}}", inner):
                    break
                content.append(inner)
            found.append((opened[2], "\n".join(content)))
    return found


def record_with(**changes: Any) -> Record:
    return realistic_records()[1].model_copy(update=changes)


def test_front_matter_names_library_and_base() -> None:
    matter = front_matter(card_text(CONFIG, CardFacts(method=make_method("lora-null"))))
    assert matter["library_name"] == "peft"
    assert matter["base_model"] == "org/base"
    assert matter["base_model_relation"] == "adapter"
    assert matter["tags"] == ["lora", "forgetless", "lora-null"]
    merged = front_matter(card_text(CONFIG, CardFacts(), merged=True))
    assert (merged["library_name"], merged["base_model_relation"]) == ("transformers", "finetune")


def test_hostile_names_stay_text() -> None:
    record = record_with(label=HOSTILE, recipe={"model": HOSTILE, "label": HOSTILE})
    facts = card_facts(record)
    config = CONFIG | {"target_modules": [HOSTILE], "revision": HOSTILE}
    card = card_text(config, facts)
    assert set(front_matter(card)) == {
        "base_model",
        "base_model_relation",
        "library_name",
        "pipeline_tag",
        "tags",
    }
    assert "\x1b" not in card
    outside = card
    for _, content in fences(card):
        outside = outside.replace(content, "")
    headings = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    expected = ["Gain and retention", "Loading", "Recipe", "Citation"]
    assert headings[1:] == expected
    assert "<" not in outside.replace("&lt;", "")
    assert not re.search(r"(?<!\\)\]\(", outside)
    [recipe] = [content for language, content in fences(card) if language == "yaml"]
    assert yaml.safe_load(recipe)["label"] == HOSTILE


def test_a_card_holds_no_rows_and_no_generations() -> None:
    rows = [{"text": "a secret row"}]
    spec = {"examples": rows, "path": None, "self": False, "seed": 0}
    record = record_with(recipe={"train_data": [spec], "seed": 0, "targets": None})
    samples = [sample for item in record.evaluation.items for sample in item.samples]
    texts = [t for s in samples for t in (s.prompt, s.base, s.tuned) if len(t) > 5]
    assert texts
    card = card_text(CONFIG, card_facts(record))
    for text in ("a secret row", *texts):
        assert text not in card
    [recipe] = [content for language, content in fences(card) if language == "yaml"]
    kept = {"train_data": [{"examples": "1 row given in Python", "seed": 0}], "seed": 0}
    assert yaml.safe_load(recipe) == kept


def test_samples_stand_there_when_asked_for_and_self_data_only_when_asked_for_by_all() -> None:
    record = record_with()
    shared, kept = record.evaluation.items[:2]
    sample = Sample(prompt=HOSTILE, reference="", base="a base text", tuned="````\n# Owned")
    items = (
        shared.model_copy(update={"samples": (sample,), "samples_can_be_shared": True}),
        kept.model_copy(update={"samples": (sample.model_copy(update={"base": "own text"}),)}),
    )
    report = record.evaluation.model_copy(update={"items": items})
    record = record.model_copy(update={"evaluation": report})

    def card(samples: Any) -> str:
        return card_text(CONFIG, card_facts(record, samples=samples))

    assert "a base text" not in card("none")
    assert "a base text" in card("shareable")
    assert "own text" not in card("shareable")
    assert "own text" in card("all")
    contents = [content for _, content in fences(card("all"))]
    assert "````\n# Owned" in contents
    assert "\x1b" not in card("all")
    with pytest.raises(AdapterError, match="expected one of none, shareable, all, got 'some'"):
        card("some")


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"examples": ["a"], "name": "x"}, True),
        ({"examples": ["a"], "name": "x", "redistributable": False}, False),
        ({"self": True, "name": "x"}, False),
    ],
)
def test_which_samples_may_be_shared(item: dict[str, Any], expected: bool) -> None:
    assert EvaluationItem(**item).samples_can_be_shared is expected


def test_a_report_of_ones_own_script_gives_the_card_its_table(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    texts = [f"The capital of country {i} is city {i * 7 % 13}." for i in range(8)]
    model = adapted(tiny_model, "b")
    item = {"name": "kept | *all*", "examples": texts}
    report = forgetless.evaluate(model, tiny_tokenizer, retention=[item])
    for target in ("peft", "merged"):
        folder = forgetless.export(
            model, tmp_path / target, target=target, method="lora-null", report=report
        )
        card = (folder / CARD).read_text()
        [line] = [
            line
            for line in card.splitlines()
            if line.startswith("| retention: kept") and "kl" in line
        ]
        assert f"{report.items[0].metrics['kl'].tuned.mean:.4g}" in line
        assert r"kept \| \*all\*" in line
        assert "2503.02659" in card
        assert texts[0] not in card
    half = forgetless.export(model, tmp_path / "half", report=report, scale=0.5)
    assert "scaled by 0.5 here" in (half / CARD).read_text()


def test_the_table_holds_the_records_figures() -> None:
    record = record_with()
    card = card_text(CONFIG, card_facts(record))
    [kl] = [line for line in card.splitlines() if line.startswith("| Kept: capitals, KL")]
    [item] = [item for item in record.evaluation.items if item.name == "capitals"]
    assert f"{item.metrics['kl'].tuned.mean:.4f}" in kl


def test_figures_of_a_scaled_export_are_those_of_its_scale_or_say_so() -> None:
    record = record_with()
    half = card_facts(record, scale=0.5)
    assert "scale 0.5" in half.figures.splitlines()[0]
    assert half.figures != card_facts(record).figures
    other = card_facts(record, scale=0.42)
    assert "those at scale 1" in " ".join(other.notes)


def test_the_loading_code_runs_up_to_the_download() -> None:
    for merged in (False, True):
        for language, content in fences(card_text(CONFIG, CardFacts(), merged=merged)):
            if language == "python":
                compile(content, "card", "exec")
                assert merged or "'org/base', revision='abc123'" in content


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/base", "org/base"),
        ("gpt2", "gpt2"),
        ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/somebody/secret/base", "base"),
        ("../models/base", "base"),
        ("", ""),
    ],
)
def test_a_local_base_is_named_without_its_path(name: str, expected: str) -> None:
    assert base_label(name) == expected


def test_a_local_base_is_called_so_and_is_no_base_model_of_the_hub(tmp_path: Path) -> None:
    for merged in (False, True):
        card = card_text(CONFIG, CardFacts(base=str(tmp_path / "llama")), merged=merged)
        assert not {"base_model", "base_model_relation"} & set(front_matter(card))
        assert "- Base model: llama (a local model)" in card
        assert "from_pretrained('llama'" not in card
        assert str(tmp_path) not in card


def test_no_path_of_this_machine_stands_in_a_card() -> None:
    local = "/home/somebody/secret"
    item = {"path": f"{local}/rows.jsonl", "name": f"{local}/rows.jsonl"}
    lm_eval = {
        "include_path": f"{local}/tasks",
        "tasks": [{"task": "x", "data_files": {"test": f"{local}/x.jsonl"}}],
    }
    record = record_with(
        recipe={
            "model": f"{local}/llama",
            "train_data": [{"path": f"{local}/patients.jsonl", "text": "/no_think {q}"}],
            "evaluation": {"gain": [item], "lm_eval": lm_eval},
            "output": f"{local}/runs/first",
        }
    )
    first, second, *_ = record.evaluation.items
    named = [first.model_copy(update={"name": f"{local}/rows.jsonl"})]
    named.append(second.model_copy(update={"name": f"{local}/more/rows.jsonl", "side": first.side}))
    report = record.evaluation.model_copy(update={"items": tuple(named)})
    model = record.model.model_copy(update={"name": f"{local}/llama"})
    record = record.model_copy(update={"evaluation": report, "model": model})
    for card in (
        card_text(CONFIG, card_facts(record, samples="all")),
        card_text(CONFIG, CardFacts(figures=report.card_figures().table)),
    ):
        assert "secret" not in card
        assert "rows.jsonl" in card
    card = card_text(CONFIG, card_facts(record))
    assert "rows.jsonl (2), " in card  # two items of one file name stay two
    [recipe] = [content for language, content in fences(card) if language == "yaml"]
    assert yaml.safe_load(recipe) == {
        "model": "llama",
        "train_data": [{"path": "patients.jsonl", "text": "/no_think {q}"}],
        "evaluation": {
            "gain": [{"path": "rows.jsonl", "name": "rows.jsonl"}],
            "lm_eval": {
                "include_path": "tasks",
                "tasks": [{"task": "x", "data_files": {"test": "x.jsonl"}}],
            },
        },
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/a/b/rows.jsonl (2)", "rows.jsonl (2)"),
        ("a/rows.csv", "rows.csv"),
        ("../a/rows", "rows"),
        ("org/data", "org/data"),
        ("input/output, in words", "input/output, in words"),
    ],
)
def test_only_paths_lose_their_folders(name: str, expected: str) -> None:
    assert public_name(name) == expected


def test_figures_on_a_quantised_base_say_so_and_a_merged_model_has_none() -> None:
    plain = record_with()
    model = plain.model.model_copy(update={"quantization": "bitsandbytes nf4"})
    record = plain.model_copy(update={"model": model})
    card = card_text(CONFIG, card_facts(record))
    assert "; trained on it quantised (bitsandbytes nf4)" in card
    assert "Both were measured on the base quantised (bitsandbytes nf4)." in card
    merged = card_text(CONFIG, card_facts(record, merged=True, samples="all"), merged=True)
    assert "retention not measured since" in merged
    assert "## Gain and retention" not in merged
    assert "## Samples" not in merged
    assert "quantised" not in card_text(CONFIG, card_facts(plain))


def test_samples_that_a_card_cannot_show_are_warned_of(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for folder in (run / "adapter", out):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    heard: list[str] = []
    write_export_card(out, run / "adapter", samples="shareable", warn=heard.append)
    [warning] = heard
    assert "shows no samples, though shareable were asked for" in warning
    save_record(record_with(method={"name": "lora-null", "rank": 8}), run / "record.json")
    write_export_card(out, run / "adapter", samples="all", warn=heard.append)
    assert len(heard) == 1
    write_export_card(out, run / "adapter", samples="all", scale=0.5, warn=heard.append)
    assert len(heard) == 2


def test_the_base_that_the_user_names_goes_before_that_of_the_record(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for folder in (run / "adapter", out):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_record(record_with(method={"name": "lora-null", "rank": 8}), run / "record.json")
    write_export_card(out, run / "adapter", base="org/published")
    assert front_matter((out / CARD).read_text())["base_model"] == "org/published"


def test_an_export_finds_the_record_beside_its_adapter(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for folder in (run / "adapter", out):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    write_export_card(out, run / "adapter")
    assert "Gain and retention" not in (out / CARD).read_text()
    save_record(record_with(method={"name": "lora-null", "rank": 8}), run / "record.json")
    write_export_card(out, run / "adapter")
    card = (out / CARD).read_text()
    assert "## Gain and retention" in card
    assert "2503.02659" in card
    (run / "record.json").write_text('{"schema_version": 1, "label')
    heard: list[str] = []
    write_export_card(out, run / "adapter", warn=heard.append)
    assert "truncated" in heard[0]
    assert sorted(path.name for path in out.iterdir()) == [CARD, "adapter_config.json"]


def test_a_folder_without_an_adapter_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="expected an adapter folder"):
        write_card(tmp_path, CardFacts())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_bibtex_of_the_paper_that_it_names(name: str) -> None:
    kind = METHODS[name]
    paper = re.search(r"\d{4}\.\d{5}", kind.paper)
    assert paper is not None
    assert any(paper.group() in entry for entry in kind.bibtex)
    for entry in kind.bibtex:
        assert re.match(r"@(misc|article|inproceedings)\{[a-z]+\d{4}[a-z]+,\n", entry)
        assert entry.count("{") == entry.count("}")
        keys = re.findall(r"^  (\w+) = \{", entry, re.MULTILINE)
        assert {"title", "author", "year", "eprint"} <= set(keys)
        assert len(keys) == len(set(keys))


def test_papers_have_keys_of_their_own() -> None:
    entries = {entry for kind in METHODS.values() for entry in kind.bibtex}
    keys = [entry.split("{", 1)[1].split(",", 1)[0] for entry in entries]
    assert len(keys) == len(set(keys))
