"""Recipes are read whole, overridden and refused with one line that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetless.errors import ForgetlessError, RecipeError
from forgetless.recipe import Recipe, json_schema, load_recipe

BASE = """
model: demo
method: {name: lora-null, rank: 8}
train_data: {path: train.jsonl, prompt: "Q: {question}", completion: " {answer}"}
preserve_data: [{path: nq.jsonl, rows: [0, 5], text: "{question}"}, self]
training: {learning_rate: 1e-3}
evaluation:
  gain: [{path: test.jsonl, name: gsm8k, metrics: [nll, last_number], limit: 100}]
  retention:
    - {path: web.jsonl, text: "{question}", name: web}
    - {self: true, seed: 9, limit: 4}
output: runs/x
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def load(text: str = BASE, *overrides: str) -> Recipe:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe("recipe.yaml", overrides)

    return load


def refusal(recipe: Any, text: str = BASE, *overrides: str) -> str:
    with pytest.raises(ForgetlessError) as error:
        recipe(text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_recipe_has_the_values_it_says_and_defaults_elsewhere(recipe: Any) -> None:
    read = recipe()
    assert read.method == {"name": "lora-null", "rank": 8}
    assert [spec.label for spec in read.train_data] == ["train.jsonl"]
    assert [spec.label for spec in read.preserve_data] == ["nq.jsonl", "self"]
    assert read.preserve_data[0].rows == (0, 5)
    assert read.training.learning_rate == 1e-3
    assert read.training.batch_size == 8
    assert read.calibration.cache
    assert read.evaluation.gain[0].metrics == ("nll", "last_number")
    assert read.output == Path("runs/x")
    assert not read.trust_remote_code


def test_retention_items_measure_nll_and_kl_unless_told_otherwise(recipe: Any) -> None:
    web, myself = recipe().evaluation.retention
    assert web.metrics == myself.metrics == ("nll", "kl")
    assert myself.name == "self"


def test_a_resolved_recipe_goes_through_json_and_loads_as_the_same(recipe: Any) -> None:
    read = recipe()
    resolved = json.loads(json.dumps(read.resolved()))
    assert Recipe.model_validate(resolved) == read
    assert resolved["training"]["scheduler"] == "cosine"
    assert resolved["preserve_data"][1]["self"] is True


def test_a_method_by_name_alone_can_be_overridden(recipe: Any) -> None:
    text = BASE.replace("method: {name: lora-null, rank: 8}", "method: lora-null")
    assert recipe(text).method == {"name": "lora-null"}
    assert recipe(text, "method.rank=4").method == {"name": "lora-null", "rank": 4}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.learning_rate=5e-4", ("training", "learning_rate"), 5e-4),
        ("training.epochs=2", ("training", "epochs"), 2.0),
        ("training.gradient_checkpointing=true", ("training", "gradient_checkpointing"), True),
        ("training.report_to=tensorboard", ("training", "report_to"), ["tensorboard"]),
        ("calibration.min_tokens=100", ("calibration", "min_tokens"), 100),
        ("evaluation.gain.0.limit=10", ("evaluation", "gain", 0, "limit"), 10),
        ("evaluation.scales=[0.5, 1]", ("evaluation", "scales"), [0.5, 1.0]),
        ("label=a=b", ("label",), "a=b"),
        ("label=", ("label",), None),
        ("targets=q_proj", ("targets",), ["q_proj"]),
        ("preserve_data=self", ("preserve_data", 0, "self"), True),
        ("seed=3", ("seed",), 3),
    ],
)
def test_overrides_are_yaml_values_at_a_key_path(
    recipe: Any, override: str, path: tuple[str | int, ...], value: object
) -> None:
    node: Any = recipe(BASE, override).resolved()
    for key in path:
        node = node[key]
    assert node == value


def test_a_single_entry_is_overridden_as_the_first_of_a_list(recipe: Any) -> None:
    read = recipe(BASE, "train_data.0.limit=3", "train_data.0.seed=4")
    assert [(spec.label, spec.limit, spec.seed) for spec in read.train_data] == [
        ("train.jsonl", 3, 4)
    ]
    assert recipe(BASE, "train_data.limit=3").train_data[0].limit == 3


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_a_label_can_be_taken_away(recipe: Any, text: str) -> None:
    assert recipe(BASE + "label: mine\n", f"label={text}").label is None


def test_the_last_override_of_a_key_wins(recipe: Any) -> None:
    assert recipe(BASE, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("", "expected key.path=value"),
        ("seed", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("a..b=3", "expected key.path=value"),
        ("seed=[1", "override 'seed=[1'"),
        ("evaluation.gain.1.limit=3", "expected 0, its only entry, behind evaluation.gain"),
        ("evaluation.gain.first.limit=3", "which is a list, got 'first'"),
        ("preserve_data.2.limit=3", "expected a number from 0 to 1 behind preserve_data"),
        ("output=", "output: expected a path, got nothing; give it a value or leave the key out"),
        ("preserve_data=", "list of these, got nothing"),
        ("train_data.prompt=Q: {quest}", """quote the value: 'train_data.prompt="Q: {quest}"\'"""),
        ("train_data.prompt={quest}", """quote the value: 'train_data.prompt="{quest}"\'"""),
        ("preserve_data.1.limit=3", "expected a mapping or a list at preserve_data.1, got 'self'"),
        ("model.name=x", "expected a mapping or a list at model, got 'demo'"),
        ("label=5", """label: expected text, got 5; to give text, quote the value: 'label="5"'"""),
        ("label=no", """expected text, got False; to give text, quote the value: 'label="no"'"""),
        ("output=007", """expected a path, got 7; to give text, quote the value: 'output="007"'"""),
        (
            "label=#x",
            """got '#x', which is a comment in YAML; to give text, quote the value: 'la""",
        ),
        ("label=it's #1", """quote the value: 'label="it'"'"'s #1"'"""),
        ("training.learning_rate=.inf", "learning_rate: expected a finite number, got inf"),
        ("training.learning_rate=.nan", "learning_rate: expected a finite number, got nan"),
        ("training.epochs=.inf", "epochs: expected a finite number, got inf"),
        ("training.weight_decay=.inf", "weight_decay: expected a finite number, got inf"),
        ("training.max_grad_norm=.inf", "max_grad_norm: expected a finite number, got inf"),
        ("evaluation.scales=[0.5, .inf]", "scales.1: expected a finite number, got inf"),
        ("training=5", "training: expected a mapping, got 5"),
        ("training.batch_size=2.5", "batch_size: expected a whole number, got 2.5"),
        ("training.batch_size=many", "batch_size: expected a whole number, got 'many'"),
        ("trainng.epochs=1", "unknown key `trainng`; did you mean `training`?"),
        ("training.lr=1", "training: unknown key `lr`"),
    ],
)
def test_a_wrong_override_says_what_is_wrong_with_it(recipe: Any, override: str, said: str) -> None:
    assert said in refusal(recipe, BASE, override)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("training:", "trainig:", "recipe.yaml: unknown key `trainig`; did you mean `training`?"),
        ("learning_rate", "learning_rat", "training: unknown key `learning_rat`; did you mean"),
        ("learning_rate: 1e-3", "learning_rate: -1", "training.learning_rate: expected greater"),
        ("prompt:", "promt:", "train_data: unknown key `promt`; did you mean `prompt`?"),
        ("rows: [0, 5]", "rows: [5, 0]", "preserve_data.0.rows: expected [start, stop]"),
        ("limit: 100", "limt: 100", "evaluation.gain.0: unknown key `limt`; did you mean `limit`?"),
        ("[nll, last_number]", "[nl]", "evaluation.gain.0.metrics.0: expected 'nll', "),
        ("name: web", "name: gsm8k", "'gsm8k' a second time"),
        ("lora-null", "lora-nul", "did you mean lora-null?"),
        ("rank: 8", "rnk: 8", "'rnk'; did you mean rank?"),
        ("rank: 8", "rank: 0", "rank: expected at least 1, got 0"),
        ("model: demo", "", "recipe.yaml: expected a key `model`, got none"),
        ("path: train.jsonl,", "", "train_data: expected exactly one of path, hub, self"),
        ("output: runs/x", "output: [1]", "output: expected"),
        ("output: runs/x", 'output: "runs\\0x"', "output: expected the path of a folder, got"),
        ("model: demo", "model: demo\nmodel: other", "line 3: not a valid recipe: the key `model`"),
        ("model: demo", "model: [demo", "not a valid recipe"),
        ("model: demo", "model: !!python/object:os.system x", "not a valid recipe"),
        ("model: demo", "model: demo\ndtype: float8", "dtype: expected 'auto', 'float32'"),
        ("train_data: {", "train_data: {rows: 3, ", "train_data.rows: expected"),
        ("{self: true, seed: 9, limit: 4}", "gone.jsonl", "evaluation.retention.1: expected an"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(
    recipe: Any, old: str, new: str, said: str
) -> None:
    assert old in BASE
    message = refusal(recipe, BASE.replace(old, new, 1))
    assert message.startswith("recipe.yaml: ")
    assert said in message


def test_a_method_without_the_data_it_needs_is_refused_at_once(recipe: Any) -> None:
    text = "\n".join(line for line in BASE.splitlines() if not line.startswith("preserve_data"))
    assert "preserve_data: expected data" in refusal(recipe, text)
    assert recipe(text, "method=lora").preserve_data == []


def test_train_data_must_not_be_empty(recipe: Any) -> None:
    assert "train_data" in refusal(recipe, BASE, "train_data=[]")


def test_an_empty_list_has_no_entry_to_override(recipe: Any) -> None:
    text = BASE.replace("preserve_data: [", "preserve_data: []\nlabel: [")
    assert "expected no number, as it is empty, behind" in refusal(
        recipe, text, "preserve_data.0=a"
    )


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_is_called_empty(recipe: Any, text: str) -> None:
    assert "recipe keys, but the file is empty; see recipes/" in refusal(recipe, text)


def test_a_file_of_data_is_no_recipe(recipe: Any) -> None:
    message = refusal(recipe, '{"question": "a"}\n{"question": "b"}\n')
    assert "line 2: expected one YAML recipe (a mapping of keys), got more" in message


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "3"])
def test_a_file_that_is_no_mapping_is_refused(recipe: Any, text: str) -> None:
    assert "expected a mapping of recipe keys" in refusal(recipe, text)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: could not be read"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match="could not be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(RecipeError, match="expected UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_the_schema_lists_every_key_as_yaml_writes_it() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "self" in schema["$defs"]["DataSpec"]["properties"]
    assert schema["additionalProperties"] is False
    kinds = [kind.get("type", "object") for kind in schema["properties"]["train_data"]["anyOf"]]
    assert kinds == ["string", "object", "array"]
    assert json.dumps(schema)


def test_the_schema_takes_what_the_recipe_takes_of_methods_and_regularisers():
    schema = json_schema()
    kinds = schema["$defs"]["TrainingRecipe"]["properties"]["regularisers"]["anyOf"]
    assert {kind.get("type") for kind in kinds} == {"string", "object", "array"}
    method = schema["properties"]["method"]["anyOf"]
    assert {kind.get("type") for kind in method} == {"string", "object"}
