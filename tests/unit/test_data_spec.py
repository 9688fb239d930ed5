"""What names data, and what is refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from forgetless.data import DataSpec, parse_data
from forgetless.data.validation import validated
from forgetless.errors import DataError, ForgetlessError, RecipeError


def one_line(error: pytest.ExceptionInfo[ForgetlessError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_an_existing_path_wins_over_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_data("squad")[0].hub == "squad"
    (tmp_path / "squad").mkdir()
    spec = parse_data("squad")[0]
    assert spec.path == Path("squad")
    assert spec.hub is None


def test_self_is_the_model_itself_and_a_path_of_that_name_needs_the_key() -> None:
    assert parse_data("self")[0].self_sampled
    assert parse_data({"self": True, "limit": 3})[0].limit == 3


@pytest.mark.parametrize("name", ["missing.jsonl", "a/b/c", "./x", "data/rows.csv", "", "a b"])
def test_a_file_that_does_not_exist_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(DataError, match="expected an existing file or folder") as error:
        parse_data(name, where="train_data")
    assert one_line(error).startswith("train_data: ")


def test_a_path_object_is_never_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an existing file"):
        parse_data(tmp_path / "nothing")


def test_a_list_of_strings_is_text_in_python_and_specs_in_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    texts = parse_data(["one", "two"])
    assert [spec.examples for spec in texts] == [["one", "two"]]
    specs = parse_data([str(file), "self"], strings="spec")
    assert [spec.label for spec in specs] == [str(file), "self"]


def test_a_name_of_data_among_texts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    for name in ("self", str(file)):
        with pytest.raises(DataError, match="a list of strings is taken as texts"):
            parse_data(["some text", name])


def test_a_mixed_list_is_one_spec_an_entry() -> None:
    specs = parse_data([{"examples": ["a"]}, "self", DataSpec(hub="x/y")])
    assert [spec.label for spec in specs] == ["examples", "self", "x/y"]


def test_datasets_are_examples_and_iterable_ones_say_what_to_do() -> None:
    data = Dataset.from_list([{"text": "a"}])
    assert parse_data(data)[0].examples is data
    assert isinstance(parse_data(DatasetDict(train=data))[0].examples, DatasetDict)
    with pytest.raises(DataError, match="IterableDataset"):
        parse_data(IterableDataset.from_generator(lambda: iter([{"text": "a"}])))


@pytest.mark.parametrize("value", [3, None, b"bytes", 1.5])
def test_what_names_no_data_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="expected a path"):
        parse_data(value)  # type: ignore[arg-type]


def test_lists_do_not_nest() -> None:
    with pytest.raises(RecipeError, match=r"data\.1: expected one data spec, got a list"):
        parse_data([{"examples": ["a"]}, [{"examples": ["b"]}]])


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(RecipeError) as error:
        parse_data({"path": "x", "promt": "{q}"}, where="train_data")
    assert one_line(error).startswith("train_data: unknown key `promt`; did you mean `prompt`?")


def test_an_unknown_key_that_is_near_to_none_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="unknown key `zzz`; known: path, hub, self, examples"):
        parse_data({"path": "x", "zzz": 1})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "exactly one of path, hub, self and examples, got none"),
        ({"path": "x", "hub": "y"}, "got path, hub"),
        ({"path": "x", "prompt": "p"}, "prompt and completion go together"),
        ({"path": "x", "text": "t", "messages": "m"}, "give one of text"),
        ({"path": "x", "rows": [3, 3]}, "0 <= start < stop"),
        ({"path": "x", "rows": [-1, 3]}, "0 <= start < stop"),
        ({"path": "x", "limit": 0}, "limit: expected greater than or equal to 1, got 0"),
        ({"path": "x", "max_length": "many"}, "max_length: expected"),
        ({"path": "x", "subset": "s"}, "subset goes with hub"),
        ({"self": True, "text": "{t}"}, "self takes no template"),
        ({"self": True, "split": "test"}, "self has no splits"),
        ({"path": "x", "messages": [{"role": "user", "content": "q"}]}, "the assistant's"),
        ({"path": "x", "messages": [{"role": "user"}]}, "keys role and content"),
        ({"path": "x", "tokens": "some"}, "tokens: expected 'all' or 'completion', got 'some'"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(keys: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_data(keys)
    assert said in one_line(error)


def test_several_findings_are_one_line_that_names_the_unknown_key_first() -> None:
    with pytest.raises(RecipeError) as error:
        validated(DataSpec, {"limt": 3, "max_length": 0}, "d")
    assert one_line(error) == "d: unknown key `limt`; did you mean `limit`? (1 more)"


def test_a_spec_goes_through_json_and_back() -> None:
    spec = DataSpec.model_validate(
        {"path": "x", "rows": [1, 4], "messages": [{"role": "assistant", "content": "{a}"}]}
    )
    dumped = json.loads(json.dumps(spec.model_dump(mode="json", by_alias=True)))
    assert DataSpec.model_validate(dumped) == spec


def test_a_dataset_in_a_spec_does_not_break_a_record() -> None:
    spec = DataSpec(examples=Dataset.from_list([{"text": "a"}]))
    assert json.dumps(spec.model_dump(mode="json"))
