"""Rows into examples: every spelling, and for every wrong field the line and the name of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.data.example import Example, Message
from nightschool.data.sources.formats import FORMATS, detect, to_examples
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError

PAIR = (Message("user", "Where?"), Message("assistant", "Here."))
USER, ASSISTANT = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}


def read(fields: dict, format_name: str = "auto") -> list[Example]:
    return to_examples(Row(fields, "train.json", 5), format_name)


def problem(fields: dict, format_name: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        read(fields, format_name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("query_retrieved", {"id": 1, "query": "Where?", "retrieved": "Here."}),
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("messages", {"messages": [USER | {"name": "Ann"}, ASSISTANT | {"tool_calls": None}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}]}, ASSISTANT]}),
        ("conversations", {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]}),
        ("conversations", {"conversations": [USER, ASSISTANT]}),
        ("conversations", {"conversation": [{"from": "User", "value": "Where?"}, {"from": "bot", "value": "Here."}]}),
        ("alpaca", {"instruction": "Where?", "input": "", "output": "Here."}),
        ("alpaca", {"instruction": "Where?", "instances": [{"input": "", "output": "Here."}], "is_classification": False}),
        ("prompt_completion", {"prompt": "Where?", "completion": "Here."}),
        ("prompt_completion", {"prompt": "Where?", "response": "Here."}),
        ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
        ("prompt_completion", {"prompt": [USER], "completion": "Here."}),
        ("prompt_completion", {"question": "Where?", "answer": "Here."}),
    ],
)  # fmt: skip
def test_every_spelling_of_a_pair_gives_the_same_example(name: str, fields: dict) -> None:
    assert detect(fields) == name
    (example,) = read(fields)
    assert example.messages == PAIR
    assert (example.source, example.line, example.id) == ("train.json", 5, str(fields.get("id", "")))
    assert read(fields, name) == [example]
    (asked,) = read(fields | {"paraphrases": ["Whither?", "At which place?"]})
    assert asked.paraphrases == ("Whither?", "At which place?")
    assert asked.digest == example.digest
    (judged,) = read(fields | {"alternatives": ["There.", "Yonder."]})
    assert judged.alternatives == ("There.", "Yonder.")
    assert judged.digest == example.digest
    # In question + answer, the answer is what is learned.
    (keyed,) = read({"answer": ["he", "re"]} | fields)
    assert keyed.key == (() if "answer" in fields else ("he", "re"))
    assert keyed.digest == example.digest
    assert Example.from_json(keyed.to_json()) == keyed
    assert Example.from_json(judged.to_json()) == judged


@pytest.mark.parametrize(("given", "key"), [("Here", ("Here",)), (" ", ()), (7, ("7",)), (2.5, ("2.5",)), (None, ())])
def test_a_key_is_a_text_or_a_number_or_none(given: object, key: tuple[str, ...]) -> None:
    (example,) = read({"query": "Where?", "retrieved": "Here.", "answer": given})
    assert example.key == key


def test_plain_text() -> None:
    (example,) = read({"text": " Once. "})
    assert example.text == " Once. "


def test_context_of_an_instruction_follows_it() -> None:
    (example,) = read({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert example.messages[0].content == "Add.\n\n1, 2"


def test_seed_tasks_give_an_example_per_instance() -> None:
    found = read(
        {
            "id": "t",
            "instruction": "Add.",
            "instances": [{"input": "1, 2", "output": "3"}, {"input": "2, 2", "output": "4"}],
        }
    )
    assert [example.answer for example in found] == ["3", "4"]
    assert [example.id for example in found] == ["t.0", "t.1"]


def test_roles_systems_and_weights() -> None:
    (example,) = read(
        {"messages": [{"role": "developer", "content": "Be kind."}, USER, ASSISTANT | {"weight": 0}, {"role": "function", "content": "7"}, ASSISTANT | {"weight": 1}]}
    )  # fmt: skip
    assert [m.role for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [m.weight for m in example.messages] == [1.0, 1.0, 0.0, 1.0, 1.0]
    (spoken,) = read({"system": "Be kind.", "conversations": [USER, ASSISTANT]})
    assert spoken.messages == (Message("system", "Be kind."), *PAIR)
    (given_,) = read({"prompt": [USER, ASSISTANT, USER], "completion": "Here."})
    assert [m.weight for m in given_.messages] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": "Where?", "retrieved": ""}, "'retrieved' is empty"),
        ({"query": " \n", "retrieved": "Here."}, "'query' is blank"),
        ({"query": "Where?", "retrieved": None}, "'retrieved' is missing"),
        ({"query": 7, "retrieved": "Here."}, "'query' is a number, but a text is expected"),
        ({"query": ["a"], "retrieved": "Here."}, "'query' is a list, but a text is expected"),
        ({"query": "a", "retrieved": "\ud83d"}, "'retrieved' holds half a character ('\\ud83d') at place 0"),
        ({"query": "a", "retrieved": "b", "id": [1]}, "'id' is a list"),
        ({"query": "a", "retrieved": "b", "paraphrases": "c"}, "'paraphrases' is a text, but a list of texts is expected"),
        ({"query": "a", "retrieved": "b", "paraphrases": ["c", ""]}, "'paraphrases[1]' is empty"),
        ({"query": "a", "retrieved": "b", "answer": {"is": "c"}}, "'answer' is an object, but what the answer has to say, a text or a list"),
        ({"query": "a", "retrieved": "b", "answer": ["c", " "]}, "'answer[1]' is blank"),
        ({"query": "a", "retrieved": "b", "alternatives": "c"}, "'alternatives' is a text, but a list of texts is expected"),
        ({"qurey": "a", "retrieved": "b"}, "the fields qurey, retrieved fit no format"),
        ({}, "the fields (none) fit no format"),
        ({"messages": []}, "'messages' is empty, but a list of turns is expected"),
        ({"messages": "hello"}, "'messages' is a text, but a list of turns is expected"),
        ({"messages": [USER]}, "the last turn of 'messages' is of the user"),
        ({"messages": [USER, ASSISTANT, USER]}, "the last turn of 'messages' is of the user"),
        ({"messages": [ASSISTANT]}, "'messages' has no turn of the user"),
        ({"messages": [USER, {"role": "wizard", "content": "x"}]}, "'messages[1].role' is 'wizard', but a role is one of"),
        ({"messages": [USER, {"content": "x"}]}, "'messages[1].role' is None"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "'messages[1].content' is missing"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "'messages[1].tool_calls': calls of tools are not read"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "'messages[1].content' is blank"),
        ({"messages": [USER, "Here."]}, "'messages[1]' is a text, but an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "'messages[0].content[0]' is not a part with a text"),
        ({"messages": [USER, ASSISTANT | {"weight": -1}]}, "'messages[1].weight' is -1"),
        ({"messages": [USER, ASSISTANT | {"weight": True}]}, "'messages[1].weight' is True"),
        ({"messages": [USER | {"weight": 2}, ASSISTANT]}, "'messages[0].weight' is 2 on a turn of the user"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "every answer in 'messages' has the weight 0"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}, "'conversations[1].value' is missing"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' is a number"),
        ({"instruction": "a", "instances": []}, "'instances' is empty"),
        ({"instruction": "a", "instances": [{"output": "b"}, {"input": "c"}]}, "'instances[1].output' is missing"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "the last turn of 'completion' is of the user"),
        ({"text": ""}, "'text' is empty"),
        ({"text": "a", "paraphrases": ["b"]}, "'paraphrases' are other wordings of a question"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_line_and_field(fields: dict, message: str) -> None:
    assert problem(fields).startswith(f"train.json:5: {message}")


def test_a_pinned_format_is_demanded() -> None:
    assert problem({"text": "a"}, "query_retrieved") == "train.json:5: 'query' is missing. Add it."
    assert problem({"text": "a"}, "messages").startswith(
        "train.json:5: 'messages' is missing, but a list of turns is expected"
    )
    assert problem({"text": "a"}, "prompt_completion").startswith("train.json:5: the fields text hold no pair")


_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "weight", "type", "text", "output", "input"]), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
_fields = st.sampled_from(
    ["id", "query", "retrieved", "messages", "conversations", "instruction", "input", "output", "instances", "prompt", "completion", "question", "answer", "alternatives", "text", "paraphrases", "system"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_fields, _value, max_size=6), st.sampled_from(["auto", *FORMATS]))
def test_arbitrary_rows_give_examples_or_a_data_error(fields: dict, format_name: str) -> None:
    try:
        examples = read(fields, format_name)
    except DataError as error:
        assert str(error).startswith("train.json:5: ")  # noqa: PT017 - either outcome is right
        return
    for example in examples:
        assert example.text or example.answer
        assert Example.from_json(example.to_json()) == example


_text = st.text(min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(_text, _text, st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=3),
    st.lists(_text, max_size=2),
    st.none() | _text,
)
def test_what_an_example_writes_is_read_back(turns, paraphrases, system) -> None:
    messages = [Message("system", system)] if system else []
    for question, answer, weight in turns:
        messages += [Message("user", question), Message("assistant", answer, weight)]
    messages[-1] = Message("assistant", messages[-1].content)
    example = Example(messages=tuple(messages), paraphrases=tuple(paraphrases), id="x", source="train.json", line=5)
    assert read(example.to_json()) == [example]
