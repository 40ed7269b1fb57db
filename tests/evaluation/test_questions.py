"""What is asked: untrained wordings where there are any, the same sample every time, and never what was corrected."""

import random
from dataclasses import dataclass, replace

import pytest

from nightschool.data.example import Example, Message
from nightschool.data.synthetic import make_world
from nightschool.evaluation.questions import make_questions


@dataclass(frozen=True)
class Pin:
    question: str
    answer: str


def fact(question, answer, *paraphrases, before=()):
    turns = [Message(role, content) for role, content in before]
    return Example((*turns, Message("user", question), Message("assistant", answer)), paraphrases=paraphrases)


def ask(new=(), old=(), pins=(), sample=100, seed=0, **more):
    return make_questions(list(new), list(old), list(pins), sample, seed, **more)


def test_new_facts_are_asked_in_wordings_that_were_not_trained_and_old_ones_as_they_were():
    new = [fact("Where does Kaja live?", "Oslo", "Kaja's city?"), fact("What is 2+2?", "4")]
    old = [fact("Who are you?", "A tutor", "What are you?")]
    asked = {(q.kind, q.question, q.expected, q.wording) for q in ask(new, old)}
    assert asked == {
        ("new", "Kaja's city?", "Oslo", "paraphrase"),
        ("new", "What is 2+2?", "4", "trained"),
        ("old", "Who are you?", "A tutor", "trained"),
    }


def test_a_wording_that_another_example_trains_is_no_paraphrase():
    new = [fact("Where does Kaja live?", "Oslo", "Kaja's city?"), fact("kaja's city", "Oslo")]
    assert {(q.question, q.wording) for q in ask(new)} == {
        ("Where does Kaja live?", "trained"),
        ("kaja's city", "trained"),
    }


def test_the_turns_before_a_question_are_kept():
    before = (("system", "Be brief."), ("user", "I am Kaja."), ("assistant", "Hello!"))
    (question,) = ask([fact("Who am I?", "Kaja", "My name?", before=before)])
    assert question.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "I am Kaja."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "My name?"},
    ]


def test_a_correction_is_no_forgetting():
    old = [
        fact("Where does Kaja live?", "Bergen"),
        fact("Where does Ola live?", "Lima"),
        fact("Kaja's city?", "Bergen"),
    ]
    new = [fact("Where does Kaja live?", "Oslo", "Kaja's city?")]
    assert [q.question for q in ask(new, old) if q.kind == "old"] == ["Where does Ola live?"]
    elsewhere = [fact("Where does Kaja live?", "Oslo", before=(("system", "It is 1990."),))]
    assert len([q for q in ask(elsewhere, old) if q.kind == "old"]) == 3, "in another context it is another question"


def test_a_pinned_question_is_asked_once_and_always():
    old = [fact("Who are you?", "A tutor")]
    pins = [Pin("who are you", "The tutor"), Pin("Where?", "a " * 500 + "place")]
    asked = ask((), old, pins, sample=1)
    assert [(q.kind, q.question, q.wording) for q in asked] == [
        ("pin", "who are you", "pinned"),
        ("pin", "Where?", "pinned"),
    ]


def test_what_cannot_be_asked_is_left_out():
    examples = [
        Example(text="A plain text."),
        fact("Empty?", "  "),
        fact("Long?", "word " * 65),
        fact("Fits?", "word " * 64),
        Example((Message("assistant", "I speak first."),)),
        Example((Message("user", "q"), Message("assistant", "a"), Message("user", "no answer"))),
    ]
    assert [q.question for q in ask(examples)] == ["Fits?"]
    assert ask(examples, max_answer_tokens=10, count_tokens=len) == []


def test_the_sample_depends_on_the_seed_and_not_on_the_order():
    world = make_world(0, 10)
    old = world.examples()
    first = ask((), old, sample=20, seed=1)
    shuffled = old[:]
    random.Random(5).shuffle(shuffled)
    assert ask((), shuffled, sample=20, seed=1) == first
    assert len(first) == 20
    assert ask((), old, sample=20, seed=2) != first


def test_a_question_is_judged_by_the_key_and_the_alternatives_of_its_example():
    turns = (Message("user", "Where?"), Message("assistant", "It lies in Oslo."))
    keyed = Example(turns, paraphrases=("At which place?",), key=("Oslo",), alternatives=("Christiania",))
    (plain,), (question,) = (
        make_questions([one], (), (), 9, 0) for one in (replace(keyed, key=(), alternatives=()), keyed)
    )
    assert (question.id, question.key, question.alternatives) == (plain.id, ("Oslo",), ("Christiania",))
    assert question.answered("Christiania").correct
    assert not plain.answered("Christiania").correct


def test_every_example_gives_one_question_before_any_gives_a_second():
    new = [fact(f"q{i}", f"a{i}", *(f"p{i}-{j}" for j in range(5))) for i in range(4)]
    assert {q.expected for q in ask(new, sample=4)} == {"a0", "a1", "a2", "a3"}
    assert len(ask(new, sample=100)) == 20


def test_ids_are_unique_and_stay_the_same():
    world = make_world(0, 4)
    asked = ask(world.new_facts(4), world.examples(), [Pin("a", "b")])
    assert len({q.id for q in asked}) == len(asked)
    assert ask(pins=[Pin("a", "b")])[0].id == "pin-" + ask(pins=[Pin("a", "b")])[0].id.removeprefix("pin-")
    assert ask(pins=[Pin("a", "b")])[0].id == next(q.id for q in asked if q.kind == "pin")


@pytest.mark.parametrize("kind", ["new", "old"])
def test_questions_survive_json(kind):
    world = make_world(0, 2)
    (first, *_) = ask(world.new_facts(2), world.examples())
    assert type(first).from_json(first.to_json()) == first
