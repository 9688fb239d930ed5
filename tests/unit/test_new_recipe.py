"""Recipes written for somebody's files: they load, and their rows stand apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from forgetless.errors import DataError, ForgetlessError, MethodError, RecipeError
from forgetless.experiments.new_recipe import write_recipe
from forgetless.recipe import load_recipe


def write_rows(path: Path, count: int, start: int = 0, answer: str = "yes") -> str:
    rows = ({"question": f"q{start + n}?", "answer": f"{answer} {n}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_new_recipe_loads_and_holds_rows_out(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", 50)
    keep = write_rows(tmp_path / "keep.jsonl", 3000, start=100)
    path = tmp_path / "new.yaml"
    made = write_recipe(path, train=train, preserve=[keep], model="demo")
    recipe = load_recipe(path)
    assert recipe == made.recipe
    assert recipe.train_data[0].rows == (0, 45)
    assert recipe.evaluation.gain[0].rows == (45, 50)
    assert recipe.evaluation.gain[0].metrics == ("nll", "exact_match")
    kept, own = recipe.evaluation.retention
    assert recipe.preserve_data[0].rows == (0, 2800)
    assert (kept.name, kept.rows, kept.metrics) == ("keep", (2800, 3000), ("nll", "kl"))
    assert recipe.preserve_data[1].rows is not None
    assert own.rows is not None
    assert recipe.preserve_data[1].rows[1] <= own.rows[0]
    assert recipe.calibration.source_weights == "equal"
    assert recipe.method["name"] == "lora-null"
    assert "# " in path.read_text()
    assert yaml.safe_load(path.read_text())["output"] == "runs/new"


def test_test_data_are_the_gain_and_long_answers_are_not_compared_as_texts(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", 5)
    test = write_rows(tmp_path / "test.jsonl", 3, start=90, answer="one two three four five")
    recipe = write_recipe(tmp_path / "r.yaml", train=train, test=test).recipe
    assert recipe.train_data[0].rows is None
    assert recipe.evaluation.gain[0].path == Path(test)
    assert recipe.evaluation.gain[0].metrics == ("nll",)


def test_an_awkward_name_of_a_file_is_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "it's: #1 {x}"
    folder.mkdir()
    train = write_rows(folder / "null.jsonl", 4)
    recipe = write_recipe(folder / "r: 'x'.yaml", train=train, preserve=[train]).recipe
    assert recipe.train_data[0].path == Path(train)


def test_two_files_of_one_name_become_two_items(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    a, b, c = (write_rows(tmp_path / n / "task.jsonl", 4, 10 * ord(n)) for n in ("a", "b", "c"))
    recipe = write_recipe(tmp_path / "r.yaml", train=a, preserve=[b, c], own_text=False).recipe
    assert [item.name for item in recipe.evaluation.retention] == ["task 2", "task 3"]


def test_the_models_own_text_is_kept_too_unless_not_wanted(tmp_path: Path) -> None:
    train, keep = (write_rows(tmp_path / f"{n}.jsonl", 9, 10 * n) for n in range(2))

    def sources(**options: object) -> list[bool]:
        path = tmp_path / "r.yaml"
        read = write_recipe(path, train=train, force=True, **options).recipe
        assert ("source_weights: equal" in path.read_text()) == (len(read.preserve_data) > 1)
        return [spec.self_sampled for spec in read.preserve_data]

    assert sources() == [True]
    assert sources(preserve=[keep]) == [False, True]
    assert sources(preserve=["self", keep]) == [False, True]
    assert sources(preserve=[keep], own_text=False) == [False]
    assert sources(preserve=["self"], own_text=False) == [True]
    assert sources(method="lora", own_text=False) == []
    with pytest.raises(RecipeError, match="preserve: expected something to keep, as the"):
        sources(own_text=False)


def test_double_rows_are_told(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text('{"text": "same"}\n' * 20)
    [note] = write_recipe(tmp_path / "r.yaml", train=str(train)).notes
    assert "2 of the rows held out" in note


def test_a_model_without_chat_template_is_asked_in_plain_text(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    train = write_rows(tmp_path / "train.jsonl", 4)
    model = str(tmp_path / "model")
    recipe = write_recipe(tmp_path / "r.yaml", train=train, model=model).recipe
    assert recipe.train_data[0].prompt == "Question: {question}\nAnswer:"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(DataError, match="expected a model with a chat template"):
        write_recipe(tmp_path / "r2.yaml", train=str(talk), model=model)
    (tmp_path / "model" / "chat_template.jinja").write_text("x")
    recipe = write_recipe(tmp_path / "r3.yaml", train=train, model=model).recipe
    assert recipe.train_data[0].messages is not None
    notes = write_recipe(tmp_path / "r4.yaml", train=train, model="nobody/unfetched").notes
    assert "not fetched yet" in notes[0]


def test_a_recipe_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", 4)
    path = tmp_path / "r.yaml"
    path.write_text("mine")
    with pytest.raises(RecipeError, match="--force"):
        write_recipe(path, train=train)
    assert path.read_text() == "mine"
    write_recipe(path, train=train, force=True)
    assert load_recipe(path).train_data[0].path == Path(train)
    with pytest.raises(RecipeError, match="got a folder"):
        write_recipe(tmp_path, train=train, force=True)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"train": "nowhere.jsonl"}, DataError, "nowhere.jsonl: expected a file"),
        ({"method": "lora-nul"}, MethodError, "did you mean lora-null"),
        ({"train": "one.jsonl"}, DataError, "at least 2 rows"),
    ],
)
def test_nothing_is_written_where_something_is_wrong(
    changes: dict[str, str],
    kind: type[ForgetlessError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "one.jsonl", 1)
    arguments = {"train": write_rows(tmp_path / "train.jsonl", 4)} | changes
    with pytest.raises(kind, match=message):
        write_recipe(Path("r.yaml"), **arguments)
    assert not Path("r.yaml").exists()
