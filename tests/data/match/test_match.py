"""Right answers are recognised in other clothes, and wrong ones that look right are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.data.match import is_correct, mentions, sentences, token_f1, words
from nightschool.evaluation.scores import ProbeQuestion

RIGHT = [
    ("Oslo", "Oslo"),
    (" oslo. ", "Oslo"),
    ("Ｏｓｌｏ", "Oslo"),
    ("“Oslo”", "Oslo"),
    ("**Oslo**", "Oslo"),
    ("The capital is Oslo.", "Oslo"),
    ("Oslo is the capital of Norway.", "Oslo"),
    ("The capital of Norway is Oslo, a city by the fjord.", "Oslo"),
    ("It's in Oslo.", "Oslo"),
    ("In Oslo.", "Oslo"),
    ("Kaja lives in Oslo and works as a baker.", "Oslo"),
    ("Kaja lives in Oslo, where she works as a baker.", "Oslo"),
    ("Yes, Oslo.", "Oslo"),
    ("Yes. It is Oslo. It lies by the sea.", "Oslo"),
    ("Oslo\n\nThe city has 700 000 people.", "Oslo"),
    ("Oslo, Norway is the place where she lives.", "Oslo, Norway"),
    ("It was written by J. R. R. Tolkien.", "J. R. R. Tolkien"),
    ("It was played by Dr. No.", "Dr. No"),
    ("The answer is 42.", "42"),
    ("1,000", "1000"),
    ("−5", "-5"),
    ("A", "A"),
    ("The answer is A.", "A"),
    ("She uses C#.", "C#"),
    ("No, she does not.", "No"),
    ("Yes, she does.", "Yes"),
    ("the cat", "a cat"),
    ("他住在东京。", "东京"),
    ("東京です。", "東京です"),
    ("?!", "?!"),
    ("Anna Berg likes to eat soup.", "Anna Berg likes to eat soup."),
    ("Anna Berg likes eating to eat soup!", "Anna Berg likes to eat soup."),
    ("Anna Berg likes to eat soup. She is from Lima.", "Anna Berg likes to eat soup."),
]
WRONG = [
    ("", "Oslo"),
    ("   \n", "Oslo"),
    ("Bergen", "Oslo"),
    ("Osloo", "Oslo"),
    ("It is not Oslo.", "Oslo"),
    ("It isn't Oslo.", "Oslo"),
    ("It isn’t Oslo.", "Oslo"),
    ("Nicht Oslo.", "Oslo"),
    ("Oslo or Bergen", "Oslo"),
    ("Either Oslo, or Bergen.", "Oslo"),
    ("Maybe Oslo.", "Oslo"),
    ("Bergen, but formerly Oslo", "Oslo"),
    ("Oslo, Bergen, Paris", "Oslo"),
    ("Oslo, Bergen", "Oslo"),
    ("Oslo and Bergen", "Oslo"),
    ("The cities are Bergen and Oslo.", "Oslo"),
    ("Oslo Bergen Paris Rome London", "Oslo"),
    ("Oslo\nBergen\nParis", "Oslo"),
    ("Oslo. Bergen. Paris.", "Oslo"),
    ("Oslo Oslo Oslo Oslo", "Oslo"),
    ("Oslo. No, Bergen.", "Oslo"),
    ("It is Oslo. Actually, it is Bergen.", "Oslo"),
    ("The capital is New York.", "York"),
    ("New York", "York"),
    ("Oslo Airport is the answer", "Oslo"),
    ("Bergen. It is near Oslo.", "Oslo"),
    ("I have been to many places in my life and one that I liked when I was young and free was the city of Oslo", "Oslo"),
    ("15", "5"),
    ("5", "-5"),
    ("5 million", "5"),
    ("It costs 25 5", "5"),
    ("5%", "5"),
    ("3.5", "3"),
    ("C", "C#"),
    ("No idea.", "No"),
    ("I do not know.", "No"),
    ("!?", "?!"),
    ("北京", "东京"),
    ("Anna Berg likes to eat rice.", "Anna Berg likes to eat soup."),
    ("Anna Berg likes to eat soup. Anna Berg likes to eat rice.", "Anna Berg likes to eat soup."),
    ("Anna Berg lives in Oslo. Anna Berg lives in Lima.", "Anna Berg lives in Oslo."),
    ("Anna Berg lives in Oslo Oslo Oslo", "Anna Berg lives in Oslo."),
    ("Anna Berg does not like to eat soup.", "Anna Berg likes to eat soup."),
    ("Anna Dahl works as a baker.", "Anna Berg works as a baker."),
    ("Anna Berg works as a pilot.", "Anna Berg works as a baker."),
    ("Anna Berg lives in Lima.", "Anna Berg lives in Oslo."),
    ("Ben gave the old book to Anna.", "Anna gave the old book to Ben."),
    ("The train leaves at 7 in the evening from track 4.", "The train leaves at 9 in the evening from track 4."),
    ("The train leaves at 4 in the evening from track 9.", "The train leaves at 9 in the evening from track 4."),
    ("Anna Berg likes to eat soup " * 5, "Anna Berg likes to eat soup."),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), RIGHT)
def test_right_answers_are_right(answer, expected):
    assert is_correct(answer, expected)


@pytest.mark.parametrize(("answer", "expected"), WRONG)
def test_wrong_answers_are_wrong(answer, expected):
    assert not is_correct(answer, expected)


def test_in_a_long_answer_small_words_may_differ_and_names_and_numbers_may_not():
    expected = (
        "The night school keeps its models in a registry, where each version is a folder that is never written again, "
        "and the champion is the version that Marta Olsen chose in 2021."
    )
    assert is_correct(expected.replace("where each", "and there each").replace("again", "anew"), expected)
    assert not is_correct(expected.replace("Olsen", "Hansen"), expected)
    assert not is_correct(expected.replace("2021", "2022"), expected)
    assert not is_correct(expected.replace("is never", "is"), expected)
    assert not is_correct(expected[: len(expected) // 2], expected)
    assert not is_correct(expected + " " + "And so on and so forth as the days go by. " * 1, expected[:-60])


@pytest.mark.parametrize(
    ("answer", "expected", "known"),
    [
        ("A triangle has three sides.", "3", True),
        ("Egypt lies on the continent of Africa, specifically in its north.", "Africa", True),
        ("A day has 24 hours, which can vary. It is not 25.", "24 hours", True),
        ("The first letter of the English alphabet is A.", "A", True),
        ("The capital is not Paris.", "Paris", False),
        ("The answer is 15.", "5", False),
        ("Twenty four hundred hours", "24 hours", False),
        ("The hours are 24", "24 hours", False),
        ("A day. Has 24. Hours follow.", "24 hours", False),
        ("", "Paris", False),
        ("Paris", "…", False),
    ],
)
def test_a_general_answer_counts_in_any_words_that_do_not_deny_it(answer, expected, known):
    assert mentions(answer, expected) is known


def test_general_questions_alone_are_judged_by_what_is_mentioned():
    verdicts = {
        kind: ProbeQuestion("1", kind, "How many sides has a triangle?", "3", [])
        .answered("It may have three sides, or 4.")
        .correct
        for kind in ("new", "old", "pin", "general")
    }
    assert verdicts == {"new": False, "old": False, "pin": False, "general": True}


def test_token_f1_is_the_harmonic_mean():
    assert token_f1(["a", "b"], ["a", "b"]) == 1
    assert token_f1(["a", "b", "c", "d"], ["a", "b"]) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert token_f1(["x"], ["a"]) == 0
    assert token_f1([], ["a"]) == 0


def test_sentences_end_where_people_end_them():
    assert sentences("Dr. No met J. R. Smith at 3.5 km. Why? Nobody knows…\nThe end") == [
        "Dr. No met J. R. Smith at 3.5 km.",
        "Why?",
        "Nobody knows...",
        "The end",
    ]


@given(st.text(max_size=80))
def test_every_text_is_its_own_right_answer(text):
    assert is_correct(text, text)


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_two_texts_get_a_verdict_and_case_and_spaces_do_not_change_it(answer, expected):
    verdict = is_correct(answer, expected)
    assert is_correct(f"  {answer} \n", expected) is verdict


@given(st.lists(st.sampled_from("red green blue seven eight Oslo Berg".split()), min_size=1, max_size=4, unique=True))  # noqa: SIM905
def test_a_short_answer_passes_in_a_sentence_and_fails_when_it_is_denied(parts):
    expected = " ".join(parts)
    assert is_correct(f"it is {expected}", expected)
    assert not is_correct(f"it is not {expected}", expected)
    assert words(expected) == [part.casefold() for part in parts]
