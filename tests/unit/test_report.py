"""The report page: self-contained, escaped, complete, and clean in a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compare_records import World
from forgetless.errors import ArtefactError
from forgetless.evaluation.results import EvaluationReport, LayerMovement, Sample
from forgetless.experiments.charts import trade_off_panels
from forgetless.experiments.drawing import Axis
from forgetless.experiments.exchanges import exchanges
from forgetless.experiments.layer_charts import layer_rows, split_layer
from forgetless.experiments.record import Record
from forgetless.experiments.report import inline_json, write_report
from forgetless.experiments.runs import name_runs
from report_records import around, item, kl, metric, movement, nll, realistic_records, record

ATTACK = (
    "</script><script>document.title='owned';alert(1)</script>"
    "<!--<img src=x onerror=alert(1)>\u2028\"'`{{7*7}}"
)


class Page(HTMLParser):
    """What a browser would make of the page: elements, their attributes, and text by element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "path", "circle", "polyline"}:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    def words(self) -> str:
        return " ".join(
            " ".join(texts) for tag, texts in self.text.items() if tag not in {"script", "style"}
        )


def page(records: list[Record], folder: Path, **options) -> Page:
    return Page(write_report(records, folder / "report.html", **options))


def hostile_records() -> list[Record]:
    """Every text that a stranger can choose carries the attack."""
    records = []
    for source in realistic_records()[:2]:
        values = source.model_dump()
        values["label"] = f"{source.label} {ATTACK}"
        values["method"] = {"name": source.method["name"], ATTACK: ATTACK}
        values["recipe"] = {ATTACK: ATTACK, "nested": [ATTACK]}
        values["versions"] = {ATTACK: ATTACK}
        values["hardware"] = {ATTACK: ATTACK}
        values["phases"] = {ATTACK: 1.0}
        values["warnings"] = [ATTACK]
        values["skipped_layers"] = {ATTACK: ATTACK}
        values["model"]["name"] = values["model"]["architecture"] = ATTACK
        values["training"]["learning_rate_source"] = ATTACK
        values["export"] = {ATTACK: ATTACK}
        for data in values["data"]:
            data["source"] = ATTACK
        report = values["evaluation"]
        layers = report["movement"]["layers"]
        layers[f"model.layers.0.{ATTACK}"] = layers["model.layers.0.mlp.up_proj"]
        for result in report["items"]:
            result["name"] += ATTACK
            result["metrics"][ATTACK] = {**result["metrics"]["nll"], "metric": ATTACK}
            result["samples"] = [dict.fromkeys(("prompt", "reference", "base", "tuned"), ATTACK)]
        records.append(Record.model_validate(values))
    return records


def test_page_loads_nothing_from_anywhere(tmp_path):
    found = page(realistic_records(), tmp_path)
    loads = [
        value
        for _, attributes in found.elements
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
    ]
    assert set(loads) == {"data:,", "#files"}
    assert "url(" not in found.source
    assert "@import" not in found.source
    assert "default-src 'none'" in found.source


def test_page_shows_everything_that_was_asked_for(tmp_path):
    words = page(realistic_records(), tmp_path, title="Demo").words()
    for claim in (
        "Demo", "LoRA-Null v2", "SC-LoRA β 0.8", "capitals", "KL", "NLL", "0.0046", "12.0\u00a0%",
        "Gain against retention", "Training", "Leakage", "Drift", "down_proj",
        "What is the capital of Australia?", "Ouagadougou.", "The capital of Australia is Canberra",
        "preserve_data:", "4f1c2ab9d0", "torch 2.13.0", "Xeon, 2 cores, AMX", "a3f09c1b77de4410",
        "lm_head", "the head is tied", "under four times the width", "calibrate", "5 min 12 s",
    ):  # fmt: skip
        assert claim in words, claim


def test_recipe_with_values_that_yaml_does_not_know_is_shown(tmp_path):
    recipe = {"output": Path("runs/a"), "betas": (0.9, 0.99)}
    shown = page([realistic_records()[0].model_copy(update={"recipe": recipe})], tmp_path)
    assert "output: runs/a\nbetas:\n- 0.9\n- 0.99" in "".join(shown.text["pre"])


def test_samples_of_the_same_prompt_stand_together_under_one_base(tmp_path):
    words = page(realistic_records(), tmp_path).words()
    assert words.count("What is the capital of Australia?") == 1
    assert words.count("The capital of Australia is Canberra.") == 1


def test_hostile_texts_stay_texts_everywhere(tmp_path):
    found = page(hostile_records(), tmp_path, title=ATTACK)
    assert found.count("script") == 2
    assert found.count("img") == 0
    assert ATTACK.replace("\u2028", "")[:40] in found.words()
    assert "{{7*7}}" in found.words()
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)


def test_inline_json_cannot_leave_its_script_and_reads_back():
    text = inline_json({"a": ATTACK})
    assert json.loads(text) == {"a": ATTACK}
    assert not set("<>&\u2028\u2029") & set(text)


def test_every_figure_is_in_the_page_as_json(tmp_path):
    found = page(realistic_records()[:1], tmp_path)
    rows = json.loads(found.text["script"][0])
    best = [r for r in rows if (r["item"], r["metric"], r["scale"]) == ("capitals", "kl", 1.0)]
    assert [(r["tuned"], r["base"], r["tuned_n"]) for r in best] == [(0.63, None, 200)]
    assert {r["scale"] for r in rows} == {0.1, 0.3, 0.5, 0.7, 0.9, 1.0}


def test_single_record_is_a_whole_page(tmp_path):
    found = page(realistic_records()[1:2], tmp_path)
    assert found.text["h1"] == [
        "LoRA-Null v2 gained 50.5\u00a0points on chain_sum and forgot some of elements."
    ]


def test_record_with_hardly_anything_measured_is_a_whole_page(tmp_path):
    bare = record("LoRA", "lora", (item("facts", "retention", nll(2.0, 2.1)),))
    training = bare.training.model_copy(update={"curve": [], "validation_nll": None})
    bare = bare.model_copy(
        update={
            "training": training,
            "phases": {},
            "skipped_layers": {},
            "warnings": [],
            "data": [],
        }
    )
    words = page([bare], tmp_path).words()
    assert "Gain against retention" not in words
    assert "How far it moved" not in words
    empty = bare.model_copy(update={"evaluation": EvaluationReport(items=())})
    assert "How it was made" in page([empty], tmp_path).words()


def test_runs_that_measured_different_things_share_a_page(tmp_path):
    first = record("LoRA", "lora", (item("a", "gain", nll(2, 1)), item("x", "retention", kl(0.1))))
    second = record("B", "b", (item("b", "gain", nll(2, 1)), item("y", "retention", nll(1, 2))),
                    moved=movement(0.1, 0.1, blocks=1))  # fmt: skip
    assert "–" in page([first, second], tmp_path).words()


def test_quick_run_carries_a_visible_note(tmp_path):
    quick = realistic_records()[0].model_copy(update={"recipe": {"claims": False}})
    words = page([quick], tmp_path).words()
    assert "A quick run claims nothing" in words
    assert "gained" not in page([quick], tmp_path).text["h1"][0]


def test_figures_that_are_not_finite_or_have_no_width_leave_no_nan(tmp_path):
    nothing = LayerMovement(
        update_size=0.0, drift=0.0, drift_calibration=None, leakage=math.nan, relative_norm=0.0
    )
    moved = movement(0.1, 0.1).model_copy(
        update={"layers": {"a.0.q": nothing, "lm": nothing}, "leakage": math.nan, "drift": math.inf}
    )
    broken = kl(0.1).model_copy(update={"tuned": around(math.nan, 0.0)})
    items = (
        item("sums", "gain", metric("last_number", 0.0, 0.0, 0.0)),
        item("facts", "retention", broken, metric("f1", 1.0, 1.0, 0.0, n=1)),
        item("more", "retention", metric("kl", None, 0.0, 0.0), nll(1.0, 1.0, 0.0)),
    )
    first = record("LoRA", "lora", items, moved=moved)
    first.training.curve[3] = first.training.curve[3].model_copy(update={"loss": math.nan})
    source = page([first, record("B", "b", items)], tmp_path).source
    body = source.split("</style>")[1].split("<script")[0].lower()
    assert re.findall(r"\b(nan|inf|infinity)\b", body) == []


def test_lone_surrogates_and_control_characters_can_be_written(tmp_path):
    sample = Sample(prompt="\ud83d broken", reference="", base="\x00\x1b", tuned="")
    odd = record("LoRA", "lora", (item("a", "gain", nll(2, 1), samples=(sample,)),))
    words = page([odd], tmp_path).words()
    assert "\ufffd broken" in words
    assert "(nothing)" in words


def test_no_records_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ArtefactError, match="at least one record"):
        write_report([], tmp_path / "report.html")


def test_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot write") as caught:
        write_report(realistic_records()[:1], tmp_path / "file" / "report.html")
    assert "\n" not in str(caught.value)


def test_older_report_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_report(realistic_records()[:1], path)
    write_report(realistic_records()[:2], path)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_layers_are_split_into_kind_and_block():
    assert split_layer("model.layers.12.mlp.up_proj") == ("mlp.up_proj", 12)
    assert split_layer("transformer.h.0.attn.c_attn") == ("attn.c_attn", 0)
    assert split_layer("0.weight2.q") == ("weight2.q", 0)
    assert split_layer("score") == ("score", None)


@pytest.mark.parametrize("make", [Axis.linear, Axis.root, Axis.log])
@pytest.mark.parametrize("values", [[0.3], [1e-9, 2.0], [4.0, 4.0], [1e5, 3e5], [1e-300, 1.0]])
def test_axes_hold_their_values_and_have_ticks(make, values):
    axis = make(values)
    assert len(axis.ticks) >= 2
    assert all(0 <= axis.share(v) <= 1 for v in values)
    assert axis.share(max(values)) >= axis.share(min(values))
    assert all(axis.label(tick) for tick in axis.ticks)


@pytest.mark.parametrize("high", [0.00005, 0.00295, 0.0045, 0.06, 0.11, 0.93, 1.5, 33.0])
def test_tick_texts_of_a_root_axis_have_room(high):
    axis = Axis.root([0.0, high])
    places = [282 * axis.share(tick) for tick in axis.ticks]  # the plot's width in the page
    widths = [6.2 * len(axis.label(tick)) for tick in axis.ticks]
    assert len(places) >= 3
    for place in range(len(places) - 1):
        room = places[place + 1] - places[place]
        assert room > (widths[place] + widths[place + 1]) / 2


def test_seven_kinds_of_layer_stand_in_one_line_and_name_their_axis(tmp_path):
    rows = layer_rows(name_runs(realistic_records()[:1]))
    assert [(len(row.panels), row.columns) for row in rows] == [(7, 7), (7, 7)]
    assert all(">block</text>" in panel.svg for row in rows for panel in row.panels)
    assert dataclasses.replace(rows[0], panels=rows[0].panels[:1] * 9).columns == 5


def test_gain_is_drawn_in_nll_where_no_share_moved():
    silent = item("sums", "gain", metric("last_number", 0.0, 0.0, 0.01), nll(8.9, 0.5))
    runs = name_runs([record("A", "lora", (silent, item("facts", "retention", kl(0.1))))])
    assert trade_off_panels(runs)[0].caption == "against NLL on sums"


def test_samples_are_stripped_judged_and_freed_of_their_template(tmp_path):
    def sample(question: str) -> Sample:
        start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
        return Sample(
            prompt=f"{start}{question}<|im_end|>\n<|im_start|>assistant\n", reference="2",
            base="\n 3", tuned=" 2", base_right=False, tuned_right=True,
        )  # fmt: skip

    samples = (sample("1 + 1?"), sample("4 - 2?"))
    one = record("LoRA", "lora", (item("sums", "gain", nll(2, 1), samples=samples),))
    first = exchanges(name_runs([one]))[0]
    assert [text for text, faint in first.parts if not faint] == ["1 + 1?"]
    assert "".join(text for text, _ in first.parts).startswith("<|im_start|>system Be kind.")
    found = page([one], tmp_path)
    assert ">3</pre>" in found.source
    assert "✓ right" in found.words()
    assert "✗ wrong" in found.words()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: the page is not opened in a browser"
)
@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("compared", [False, True])
def test_browser_opens_the_page_without_a_complaint(tmp_path, hostile, compared):
    if compared:
        records = compared_records(hostile)
    else:
        records = hostile_records() if hostile else realistic_records()
    path = write_report(records, tmp_path / "report.html")
    shown, console = in_browser(path, tmp_path)
    assert console == []
    assert "<title>owned" not in shown
    assert '<p class="small" id="files">' in shown, "the page's own script did not run"


def in_browser(path: Path, folder: Path) -> tuple[str, list[str]]:
    """The page as a browser has it after its scripts, and what reached the console.

    A blocked load, a refused script and an exception all do.
    """
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def compared_records(hostile: bool = False) -> list[Record]:
    arms = {"lora": {"scaled": True}, "lora-null": {"method": "lora-null", "factor": 0.1}}
    records = World().records(arms, seeds=(0, 1))
    if not hostile:
        return records
    found = []
    for one in records:
        values = one.model_dump()
        values["label"] = values["model"]["name"] = ATTACK
        values["method"][ATTACK] = ATTACK
        values["recipe"][ATTACK] = ATTACK
        for report in (values["evaluation"], *values["scaled"]):
            for result in report["items"]:
                result["name"] += ATTACK
        found.append(Record.model_validate(values))
    return found


def test_many_runs_are_compared_by_method_with_every_point_and_its_recipe(tmp_path):
    found = page(compared_records(), tmp_path)
    words = found.words()
    assert "lora-null kept more than plain LoRA at the same gain" in words
    assert "2 of 16 runs" in words
    hints = [text for text in found.text["title"] if ", rate " in text]
    # Eight rates of two methods; plain LoRA at three scales of each.
    assert len(hints) == 8 + 4 * 3
    assert all("method: lora" in hint and "2 seeds" in hint for hint in hints)
    rows = json.loads(found.text["script"][0])
    assert {row["rate"] for row in rows} == {2e-4, 5e-4, 1e-3, 2e-3}


def test_a_comparison_escapes_what_strangers_wrote(tmp_path):
    found = page(compared_records(hostile=True), tmp_path)
    assert found.count("script") == 2
    assert found.count("img") == 0


SORTED = """
<script>
  const head = document.querySelectorAll("table.sortable")[0].tHead.rows[0];
  const names = function () {
    return Array.from(document.querySelectorAll("table.sortable")[0].tBodies[0].rows)
      .map(function (row) { return row.cells[0].textContent.trim(); }).join(" < ");
  };
  head.cells[4].querySelector("button").click();
  const up = names();
  head.cells[4].querySelector("button").click();
  document.title = up + " then " + names();
</script>
"""


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: the page is not opened in a browser"
)
def test_a_click_sorts_a_table_and_another_one_turns_it(tmp_path):
    path = write_report(compared_records(), tmp_path / "report.html")
    text = path.read_text()
    # The page's policy refuses scripts that are not its own: here one has to click.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    path.write_text(text.replace("</body>", f"{SORTED}</body>"))
    shown, console = in_browser(path, tmp_path)
    assert console == []
    # Column 4 is the KL: lora-null has the smaller one.
    assert "<title>lora-null &lt; lora then lora &lt; lora-null</title>" in shown
