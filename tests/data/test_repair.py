"""Conversations as applications keep them become conversations that can be learned."""

import pytest

from nightschool.data.chat.render import render_example
from nightschool.data.example import Message
from nightschool.data.sources.repair import RULES, repair_conversations
from tests.support.tokenizers_for_tests import byte_tokenizer

NAMES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def conversation(*turns):
    """`("u", "Hello")` is a message of the user."""
    return [Message(NAMES[role], content) for role, content in turns]


def repaired(*turns):
    found = repair_conversations([conversation(*turns)], "here")
    return [[(m.role[0], m.content) for m in example.messages] for example in found.examples], dict(found.repairs)


def test_what_is_in_order_stays_as_it_is():
    turns = [("s", "Be kind."), ("u", "Hi"), ("a", "Hello"), ("u", "And?"), ("a", "So.")]
    assert repaired(*turns) == ([turns], {})


@pytest.mark.parametrize(
    ("turns", "kept", "repairs"),
    [
        ([("a", "Welcome!"), ("u", "Hi"), ("a", "Hello")], [("u", "Hi"), ("a", "Hello")], {"leading_answers": 1}),
        ([("u", "Hi"), ("a", "Hello"), ("u", "?")], [("u", "Hi"), ("a", "Hello")], {"unanswered": 1}),
        ([("u", "Hi"), ("u", "you"), ("a", "A"), ("a", "B")], [("u", "Hi\nyou"), ("a", "A\nB")], {"merged": 2}),
        ([("u", " "), ("u", "Hi"), ("a", "A"), ("a", "")], [("u", "Hi"), ("a", "A")], {"blank_messages": 2}),
        (
            [("u", "Hi"), ("s", "Be kind."), ("a", "A")],
            [("s", "Be kind."), ("u", "Hi"), ("a", "A")],
            {"system_moved": 1},
        ),
        (
            [("s", "One."), ("s", "Two."), ("u", "Hi"), ("a", "A")],
            [("s", "One.\nTwo."), ("u", "Hi"), ("a", "A")],
            {"merged": 1},
        ),
    ],
)
def test_each_repair_is_counted(turns, kept, repairs):
    assert repaired(*turns) == ([kept], repairs)


@pytest.mark.parametrize(
    "turns",
    [
        [("u", "Anybody?")],
        [("a", "Welcome!")],
        [("s", "Be kind.")],
        [("a", "Welcome!"), ("u", "Anybody?")],
        [("u", "Hi"), ("a", "  ")],
    ],
)
def test_a_conversation_without_question_and_answer_is_left_out_and_counted(turns):
    assert repaired(*turns) == ([], {"without_answer": 1})


def test_what_tools_returned_stays_where_it_is():
    turns = [("u", "Sum?"), ("t", "1"), ("t", "2"), ("a", "3")]
    assert repaired(*turns) == ([turns], {})


def test_the_same_conversation_is_learned_once():
    one, other = conversation(("u", "Hi"), ("a", "A")), conversation(("u", "Hi"), ("a", "B"))
    found = repair_conversations([one, other, one, [*one, Message("user", "?")]], "here")
    assert [example.line for example in found.examples] == [1, 2]
    assert found.repairs == {"duplicates": 2, "unanswered": 1}


def test_every_repair_has_a_sentence():
    turns = [("s", "x"), ("a", "y"), ("u", ""), ("u", "Hi"), ("s", "z"), ("a", "A"), ("a", "B"), ("u", "?")]
    found = repair_conversations([conversation(*turns), conversation(*turns), conversation(("u", "Hi"))], "here")
    assert set(found.repairs) == set(RULES)


def test_what_was_repaired_can_be_rendered_and_only_answers_carry_loss():
    turns = [("a", "Welcome!"), ("u", "Hi"), ("u", "you"), ("a", "Hello"), ("s", "Kind."), ("u", "?"), ("a", "So.")]
    [example] = repair_conversations([conversation(*turns)], "here").examples
    rendered = render_example(byte_tokenizer(), example, 200)
    trained = {role for role, weight in zip(rendered.roles, rendered.weights, strict=True) if weight > 0}
    assert trained == {"assistant"}
