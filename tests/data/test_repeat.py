"""Corrections: read more than once, and not contradicted by what they correct."""

from __future__ import annotations

import json

from nightschool.config.recipe import Recipe
from nightschool.data.example import Example, Message, corrected_answers
from nightschool.data.sources.problems import Problems
from nightschool.evaluation.questions import make_questions
from nightschool.feedback.conversation_examples import examples_of
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.selection import select_examples
from nightschool.feedback.selection_files import read_selection, write_selection
from nightschool.store.database import Database
from nightschool.store.home import Home


def pair(question: str, answer: str, **more: object) -> Example:
    return Example(messages=(Message("user", question), Message("assistant", answer)), **more)  # type: ignore[arg-type]


def home_with_a_correction(tmp_path) -> Home:
    """The model learned one fact in three wordings and another one; a person corrected the first in one wording."""
    home = Home(tmp_path / ".nightschool").ensure()
    db = Database(home).connect()
    learned = [pair(q, "Bo lives in Rome.") for q in ("Where is Bo?", "Bo lives where?", "Which city has Bo?")]
    learned.append(pair("Where is Al?", "Al lives in Oslo."))
    AcceptedExamples(db).add("bot", "20260101_000000", [one.to_json() for one in learned])
    conversations = ConversationStore(db)
    conversations.record(
        "r1", "bot", "20260101_000000", [{"role": "user", "content": "Where is Bo?"}], "Bo lives in Rome."
    )
    conversations.feedback("r1", correction="Bo lives in Lima.")
    return home


def selected(home: Home, tmp_path, **source: object):
    recipe = Recipe.model_validate(
        {
            "name": "bot",
            "base": "new:tiny",
            "data": [{"from": "conversations", **source}],
            "replay": {"ratio": 10},
        }
    )
    return select_examples(recipe, home, tmp_path)


def test_a_new_example_is_studied_as_often_as_its_source_says(tmp_path):
    home = home_with_a_correction(tmp_path)
    once, often = selected(home, tmp_path), selected(home, tmp_path, repeat=5)
    assert [example.answer for example in once.train].count("Bo lives in Lima.") == 1
    assert [example.answer for example in often.train].count("Bo lives in Lima.") == 5
    write_selection(tmp_path, often)
    again = read_selection(tmp_path)
    assert again is not None
    assert again.train == often.train


def test_what_was_corrected_is_not_replayed_in_any_wording(tmp_path):
    selection = selected(home_with_a_correction(tmp_path), tmp_path)
    assert [example.answer for example in selection.replayed] == ["Al lives in Oslo."]


def test_what_was_corrected_is_not_asked_as_an_old_fact():
    old = [pair("Bo lives where?", "Bo lives in Rome."), pair("Where is Al?", "Al lives in Oslo.")]
    new = [pair("Where is Bo?", "Bo lives in Lima.", corrects="Bo lives in Rome.")]
    asked = [question.question for question in make_questions(new, old, [], 10, 0) if question.kind == "old"]
    assert asked == ["Where is Al?"]
    uncorrected = [pair("Where is Bo?", "Bo lives in Lima.")]
    asked = [question.question for question in make_questions(uncorrected, old, [], 10, 0) if question.kind == "old"]
    assert sorted(asked) == ["Bo lives where?", "Where is Al?"]


def test_a_short_answer_that_was_corrected_once_may_be_right_elsewhere():
    assert corrected_answers([pair("Is it on?", "No.", corrects="Yes.")]) == frozenset()


def test_a_correction_remembers_what_it_corrects(tmp_path):
    home = home_with_a_correction(tmp_path)
    [example] = examples_of(ConversationStore(Database(home).connect()).select(corrected=True), Problems()).examples
    assert example.corrects == "Bo lives in Rome."
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example
