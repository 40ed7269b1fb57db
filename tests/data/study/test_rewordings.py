"""Other wordings of a question: each asks the same, in English that a person would write, or is not made."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.data.study.rewordings import MOST_FRAMES, reverse_question, rewordings, statement, wording


def table():
    lines = Path(__file__).with_name("wordings.txt").read_text().splitlines()[1:]
    found: dict[str, set[str]] = {}
    question = ""
    for line in lines:
        if line.startswith("  "):
            found[question].add(line.strip())
        else:
            question = line
            found[question] = set()
    return found


def test_questions_of_many_kinds_are_reworded_as_one_reader_approved():
    read = table()
    assert len(read) >= 60
    made = {question: {one.question for one in rewordings(question, 0) if one.rule != "frame"} for question in read}
    assert made == read


@pytest.mark.parametrize(
    "text",
    [
        "Was kostet der Versand nach Oslo?",
        "Où habite Anna ?",
        "Где живёт Анна?",
        "安娜住在哪里？",
        "",
        "?",
        "Hm?",
        "Write a poem.\nWhere is it?",
    ],
)
def test_what_is_no_english_question_stays_alone(text):
    assert rewordings(text, 0) == []


def test_a_seed_gives_the_same_order_and_another_seed_the_same_rewordings():
    question = "Where does Leon Dahl live?"
    assert rewordings(question, 1) == rewordings(question, 1) != rewordings(question, 2)
    real = [{one.question for one in rewordings(question, seed) if one.rule != "frame"} for seed in (1, 2)]
    assert real[0] == real[1]


@given(
    st.text(max_size=80)
    | st.from_regex(r"(What|Who|Where|How many|Is|Does|Tell me) [a-z A-Z?'.,{}]{0,60}\?", fullmatch=True),
    st.integers(0, 3),
)
def test_rewordings_of_anything_differ_from_it_and_from_one_another(question, seed):
    made = rewordings(question, seed)
    wordings = [wording(question), *(wording(one.question) for one in made)]
    assert len(set(wordings)) == len(wordings)
    assert sum(one.rule == "frame" for one in made) <= MOST_FRAMES
    assert all(one.question[0] == one.question[0].upper() and one.question.strip() for one in made)


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("What is the capital of Velmark?", "Orrin", "The capital of Velmark is Orrin."),
        ("Where does Anna live?", "In Oslo.", "Anna lives in Oslo."),
        ("What is frozen water called?", "ice", "Frozen water is called ice."),
        ("Where does Anna live?", "Anna lives in Oslo.", "Anna lives in Oslo."),
        ("Where does Anna live?", "Oslo", None),
        ("Who wrote The Salt Road?", "Mira Okafor", None),
        ("Tell me a joke.", "No", None),
    ],
)
def test_a_fact_is_said_as_a_sentence_where_that_is_sure(question, answer, said):
    assert statement(question, answer) == said


def test_only_what_is_one_to_one_is_asked_the_other_way_round():
    assert reverse_question("What is the capital of Velmark?", "Orrin") == "Of what is Orrin the capital?"
    assert reverse_question("Where does Anna live?", "Oslo") is None
    assert reverse_question("What is the capital of Velmark?", "It has none, they say.") is None
