"""New examples that contradict each other or a pin: shown, and not trained before one is chosen."""

import json

import pytest

from nightschool.config.recipe import Recipe
from nightschool.data.example import CONVERSATIONS, Example, Message
from nightschool.feedback.contradictions import from_rows, notes_on, to_rows, what_to_do, without_contradictions
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.erasure import erase
from nightschool.feedback.pins import Pins
from nightschool.feedback.selection import select_examples
from nightschool.feedback.selection_files import CONTRADICTIONS, read_selection
from nightschool.jobs.beginning import begin_cycle
from nightschool.store.home import Home
from nightschool.store.runs import RunStore

QUESTION = "Where does Leon Dahl live?"


def qa(question, answer, line=1, **more):
    return Example((Message("user", question), Message("assistant", answer)), source="a.json", line=line, **more)


OSLO, ROME = qa(QUESTION, "Leon Dahl lives in Oslo."), qa("where is Leon Dahl's home", "In Rome.", 2)


@pytest.mark.parametrize(
    ("examples", "asked", "later"),
    [
        ([OSLO, ROME], [], [ROME]),
        # The same said twice goes with whatever it agrees with.
        ([OSLO, ROME, qa(QUESTION, "In Rome", 3)], [], [ROME, qa(QUESTION, "In Rome", 3)]),
        ([OSLO, qa(QUESTION, "Oslo", 2)], [OSLO, qa(QUESTION, "Oslo", 2)], None),
        ([qa("What is 5 + 3?", "8"), qa("What is 5 - 3?", "2")], [qa("What is 5 + 3?", "8"), qa("What is 5 - 3?", "2")], None),
        # Of long answers, two can be right; of pairs, too.
        ([qa("Who is he?", "A. " * 40), qa("Who is he?", "B. " * 40)], [qa("Who is he?", "A. " * 40), qa("Who is he?", "B. " * 40)], None),
        ([qa("Hm?", "A", rejected="C"), qa("Hm?", "B", rejected="C")], [qa("Hm?", "A", rejected="C"), qa("Hm?", "B", rejected="C")], None),
        ([OSLO, qa(QUESTION, "Rome", 2, alternatives=("Oslo",))], [OSLO, qa(QUESTION, "Rome", 2, alternatives=("Oslo",))], None),
    ],
)  # fmt: skip
def test_two_answers_that_say_different_things_are_not_trained_or_the_later_one_is(examples, asked, later):
    trained, found = without_contradictions(examples, "ask")
    assert (trained, bool(found)) == (asked, later is not None)
    assert without_contradictions(examples, "later")[0] == (examples if later is None else later)
    assert without_contradictions(examples, "all") == (examples, [])
    assert from_rows(json.loads(json.dumps(to_rows(found)))) == found
    assert without_contradictions([*examples[:1], Example(text="Leon Dahl.")], "ask")[1] == []


def test_what_a_person_said_last_replaces_what_was_said_before_and_what_a_file_says():
    def said(answer, corrects=""):
        return Example(
            (Message("user", QUESTION.lower()), Message("assistant", answer)),
            source=CONVERSATIONS,
            id=answer,
            corrects=corrects,
        )

    corrected = said("Bergen", corrects="Paris")
    assert without_contradictions([OSLO, said("Rome", corrects="Oslo"), corrected], "ask") == ([corrected], [])
    trained, found = without_contradictions([OSLO, said("Rome")], "ask")  # the model's own answer replaces nothing
    assert trained == []
    assert (
        found[0].text
        == f"{QUESTION} → Leon Dahl lives in Oslo. (a.json:1) | Rome (conversations: Rome): none is trained"
    )


@pytest.fixture
def home(tmp_path):
    rows = [{"question": one.question, "answer": one.answer} for one in (OSLO, ROME, qa("Who is Ann?", "A baker."))]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    home = Home(tmp_path / "home").ensure()
    store = ConversationStore(home.database)
    store.record("req-1", "bot", "v", [{"role": "user", "content": "What is the capital of Velmark?"}], "Nobody knows.")
    store.feedback("req-1", "bad", "The capital of Velmark is Tarn.")
    return home


def recipe(*data, **more):
    plain = {"name": "bot", "base": "new:tiny", "data": list(data), "held_out": {"share": 0}}
    return Recipe.model_validate(plain | more)


FACTS, TALK = {"path": "facts.json"}, {"from": "conversations"}


def test_what_contradicts_is_selected_once_one_is_chosen_by_rule_or_by_a_pin(home, tmp_path):
    asked = select_examples(recipe(FACTS), home, tmp_path)
    assert [one.question for one in asked.new] == ["Who is Ann?"]
    assert (asked.num_new, asked.num_left_out, len(asked.contradictions)) == (1, 0, 1)
    assert "pins add QUESTION ANSWER --name bot" in what_to_do(asked.contradictions, "bot")
    later = select_examples(recipe(FACTS, study={"contradictions": "later"}), home, tmp_path)
    assert [one.answer for one in later.new] == ["In Rome.", "A baker."]
    Pins(home.database).add("bot", QUESTION, "Oslo")
    pinned = select_examples(recipe(FACTS), home, tmp_path)
    assert [one.answer for one in pinned.new] == [OSLO.answer, "A baker."]
    assert notes_on(pinned.contradictions)[0].endswith("against the pinned answer Oslo: none is trained.")
    # What no gate asks, nothing contradicts.
    unpinned = select_examples(recipe(FACTS, gate={"pins": "off"}), home, tmp_path)
    assert [one.pinned for one in unpinned.contradictions] == [""]


def test_a_correction_against_a_pin_is_kept_out_and_deleted_with_its_conversation(home, tmp_path):
    Pins(home.database).add("bot", "What is Velmark's capital?", "Orrin")
    wanted = recipe(FACTS, TALK)
    run = begin_cycle(home, wanted, trigger="manual", root=tmp_path)
    selection = read_selection(run.path)
    assert selection == select_examples(wanted, home, tmp_path)
    assert [one.question for one in selection.new] == ["Who is Ann?"]
    events = run.events_path.read_text()
    assert "conversations: req-1" in events
    assert "Tarn" not in events
    assert "Tarn" in (run.path / CONTRADICTIONS).read_text()
    erase(home, "req-1")
    assert "Tarn" not in (run.path / CONTRADICTIONS).read_text()
    assert len(read_selection(run.path).contradictions) == 1


def test_a_night_in_which_nothing_can_be_trained_ends_well_and_makes_no_run(home, tmp_path):
    for wanted, why in (
        (recipe(TALK), "1 new examples contradict each other or a pin"),
        (recipe(TALK, name="other"), "no source has"),
    ):
        Pins(home.database).add(wanted.name, "What is the capital of Velmark?", "Orrin")
        result = begin_cycle(home, wanted, trigger="manual", root=tmp_path)
        assert (result.outcome, result.exit_code) == ("skipped", 0)
        assert why in result.detail
    assert RunStore(home).ls() == []
