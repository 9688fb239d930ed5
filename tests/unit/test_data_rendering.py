"""Templates, known columns and chat messages become prompt, completion and accepted answers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from forgetless.data import DataSpec, Row, load_rows
from forgetless.data.loading import check_rows
from forgetless.data.rows import RowSet
from forgetless.errors import DataError

USER = {"role": "user", "content": "Where is it?"}
ASSISTANT = {"role": "assistant", "content": "There."}
# As the fixture's template writes it, by hand.
OPENED = "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def rows(tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    def load(*examples: Any, **keys: Any) -> tuple[Row, ...]:
        return load_rows(DataSpec(examples=list(examples), **keys), tiny_tokenizer).rows

    return load


def test_prompt_and_completion_templates_fill_columns(rows: Any) -> None:
    record = {"question": "2+2?", "answer": 4, "unused": None}
    assert rows(record, prompt="Q: {question}\nA:", completion=" {answer} {{ok}}") == (
        Row("Q: 2+2?\nA:", " 4 {ok}", ("4 {ok}",)),
    )


def test_a_list_gives_its_first_item_in_text_and_all_as_answers(rows: Any) -> None:
    (row,) = rows(
        {"q": ["Who?"], "a": ["Ann", " Anna ", "Ann"]}, prompt="{q}", completion=" It is {a}."
    )
    assert (row.prompt, row.completion) == ("Who?", " It is Ann.")
    assert row.answers == ("Ann", "Anna")


def test_values_that_look_like_templates_are_not_filled_again(rows: Any) -> None:
    assert rows({"a": "{b}", "b": "secret"}, text="<{a}>")[0].text == "<{b}>"


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{}", "{a!r}", "{a:>9}", "{a.b.c}", "{0.__init__}", "{a[x].y}"],
)
def test_a_template_reaches_no_attribute_index_or_format(rows: Any, template: str) -> None:
    with pytest.raises(DataError, match="expected a plain column name in braces"):
        rows({"a": "x", "a.b": "y"}, text=template)


@pytest.mark.parametrize("template", ["{a", "a}", "{a{b}"])
def test_unbalanced_braces_are_refused(rows: Any, template: str) -> None:
    with pytest.raises(DataError, match="template"):
        rows({"a": "x"}, text=template)


def test_a_missing_field_is_named_with_the_template_and_the_columns(rows: Any) -> None:
    with pytest.raises(DataError) as error:
        rows({"question": "q", "answer": "a"}, {"other": 1}, text="{questoin}!")
    message = str(error.value)
    assert message == (
        "examples: row 0: template '{questoin}!' names the field 'questoin', which is not among "
        "the columns question, answer; did you mean `question`?"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"row 0: field 'a' is empty \(null\)"),
        ([], "field 'a': expected at least one item"),
        ({"text": ["x"]}, "expected text or a number"),
        ([{"x": 1}], "expected text or a number"),
    ],
)
def test_a_value_that_is_no_text_is_refused(rows: Any, value: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rows({"a": value}, text="{a}")


def test_known_columns_need_no_template(rows: Any) -> None:
    assert rows("a text")[0] == Row("", "a text", ("a text",))
    assert rows({"text": "a text", "id": 3})[0].text == "a text"
    assert rows({"prompt": "p", "completion": " c"})[0] == Row("p", " c", ("c",))
    assert rows({"prompt": "p", "completion": ["c", "d"]})[0].answers == ("c", "d")


def test_no_template_and_no_known_column_lists_the_columns(rows: Any) -> None:
    with pytest.raises(DataError, match="got no template and the columns question, answer"):
        rows({"question": "q", "answer": "a"})


def test_messages_are_rendered_by_the_chat_template(rows: Any) -> None:
    expected = Row(OPENED, "There.<|im_end|>", ("There.",), templated=True)
    conversation = [USER, ASSISTANT]
    assert rows({"messages": conversation})[0] == expected
    assert rows({"chat": conversation}, messages="chat")[0] == expected
    assert rows({"prompt": [USER], "completion": [ASSISTANT]})[0] == expected
    assert rows({"prompt": [USER], "completion": "There."})[0] == expected
    assert rows(
        {"q": "it", "a": ["There", "Here"]},
        messages=(
            {"role": "user", "content": "Where is {q}?"},
            {"role": "assistant", "content": "{a}."},
        ),
    )[0] == Row(OPENED, "There.<|im_end|>", ("There", "Here"), templated=True)


def test_a_prompt_that_ends_in_the_assistants_turn_is_continued(rows: Any) -> None:
    stem = {"role": "assistant", "content": "The capital of France is"}
    (row,) = rows({"prompt": [USER, stem], "completion": " Paris"})
    assert row == Row(OPENED + "The capital of France is", " Paris", ("Paris",), templated=True)


def test_earlier_turns_and_system_messages_belong_to_the_prompt(rows: Any) -> None:
    system = {"role": "system", "content": "Be brief."}
    (row,) = rows({"messages": [system, USER, ASSISTANT, USER, ASSISTANT]})
    assert row.prompt == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n{OPENED}There.<|im_end|>\n{OPENED}"
    )
    assert row.completion == "There.<|im_end|>"


def test_a_template_that_opens_a_turn_differently_is_split_at_the_assistants_text(
    rows: Any, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    (row,) = rows({"messages": [USER, ASSISTANT]})
    assert row.prompt == "[user]Where is it?<|im_end|>\n[assistant]"
    assert row.completion == "There.<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER], "expected a message before the assistant's"),
        ([USER, USER], "expected the last message to be the assistant's, got the role 'user'"),
        ("text", "expected a list of messages"),
        ([], "expected a list of messages"),
        ([USER, {"role": "assistant"}], "to have role and content"),
        ([USER, {"role": "assistant", "content": None}], "content to be text"),
    ],
)
def test_messages_that_teach_nothing_are_refused(rows: Any, messages: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rows({"messages": messages})


def test_a_tokenizer_without_chat_template_says_so(
    rows: Any, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_tokenizer.chat_template = None
    with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
        rows({"messages": [USER, ASSISTANT]})


def test_messages_that_the_chat_template_refuses_are_one_line(
    rows: Any, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(DataError, match=r"refuses the messages .roles must alter"):
        rows({"messages": [USER, ASSISTANT]})


def test_blank_rows_are_left_out_aloud(rows: Any) -> None:
    with pytest.warns(UserWarning, match="examples: 2 blank rows are left out"):
        assert len(rows("a", " ", "b", "")) == 2
    with pytest.raises(DataError, match="got 1 blank rows"):
        rows(" \n")


@pytest.mark.parametrize(
    "keys",
    [
        {"prompt": "Q: {q}", "completion": " {a}"},
        {
            "messages": [
                {"role": "user", "content": "{q}"},
                {"role": "assistant", "content": "{a}"},
            ]
        },
    ],
)
def test_rows_with_a_blank_completion_are_left_out_aloud_where_it_is_needed(
    tiny_tokenizer: PreTrainedTokenizerBase, keys: dict[str, Any]
) -> None:
    records = [{"q": "one", "a": "1"}, {"q": "two", "a": ""}, {"q": "three", "a": " "}]
    spec = DataSpec(examples=records, **keys)
    assert len(load_rows(spec, tiny_tokenizer).rows) == 3
    with pytest.warns(UserWarning, match="examples: 2 rows with a blank completion are left out"):
        kept = load_rows(spec, tiny_tokenizer, needs_completion=True).rows
    assert [row.answers for row in kept] == [("1",)]
    with pytest.raises(DataError, match="got 2 rows with a blank one; fill the column"):
        load_rows(spec.model_copy(update={"rows": (1, 3)}), tiny_tokenizer, needs_completion=True)


def test_what_takes_no_model_is_checked_without_one(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = DataSpec(examples=[{"q": "a"}, {"q": " "}], text="{q}")
    with pytest.warns(UserWarning, match="1 blank row is left out"):
        assert check_rows(plain) == load_rows(plain, tiny_tokenizer)
    turns = ({"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{nowhere}"})
    with pytest.raises(DataError, match="names the field 'nowhere'"):
        check_rows(DataSpec(examples=[{"q": "a"}], messages=turns))
    assert check_rows(DataSpec(self_sampled=True)).rows == ()


def test_a_fingerprint_tells_rows_lengths_and_token_rules_apart(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    def fingerprint(**keys: Any) -> str:
        keys = {"examples": [{"a": "x", "b": "y"}], "prompt": "{a}", "completion": "{b}", **keys}
        return load_rows(DataSpec(**keys), tiny_tokenizer).fingerprint

    variants = [
        {},
        {"max_length": 64},
        {"tokens": "completion"},
        {"prompt": "{a}{b}", "completion": ""},
        {"examples": [{"a": "x", "b": "z"}]},
        {"examples": [{"a": "x", "b": "y"}] * 2},
    ]
    assert len({fingerprint(**keys) for keys in variants}) == len(variants)
    assert fingerprint() == fingerprint(seed=5)


def test_self_data_without_a_model_say_what_is_missing(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(DataError, match="self: expected a model"):
        load_rows(DataSpec(self_sampled=True), tiny_tokenizer)


def test_a_fingerprint_tells_accepted_answers_apart():
    """Rows judged by other answers are other rows, whatever the model reads."""
    one, more = (Row("Q:", " a", answers=answers) for answers in (("a",), ("a", "b")))
    spec = DataSpec(examples=["Q: a"])
    assert RowSet(spec, (one,)).fingerprint != RowSet(spec, (more,)).fingerprint
