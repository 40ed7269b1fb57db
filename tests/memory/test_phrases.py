"""Whether a name in a text is all of a name there: what stands beside it tells."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.memory.encoders.phrases import OPENERS, Standing, standing

NAMES = {"Ada", "Byron", "Paris", "Hilton", "Oslo", "King", "Queensland", "Austria", "Curtis", "Venus", "Jean", "Yves"}


def stands(text, name, *, has_capitals=True, told=()):
    start = text.index(name)
    return standing(
        text,
        start,
        start + len(name),
        has_capitals=has_capitals,
        writing=lambda words: set(words.split()) <= NAMES,
        explained=lambda begin, end: text[begin:end].lower() in told,
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Where does Ada live?", "Ada"),
        ("Does Ada live in Oslo?", "Oslo"),
        ("Ada's employer is", "Ada"),
        ("Where is Ada’s brother?", "Ada"),
        ("Oslo, Norway is", "Oslo"),
        ("Is Ada with Byron?", "Byron"),
        ("Describe Venus.", "Venus"),
        ("In 2008 Oslo had", "Oslo"),
        ("the population of Oslo is", "Oslo"),
        ("Population of Oslo:", "Oslo"),
        ("player Paul King", "Paul King"),
        ("Who invented mathematics?", "mathematics"),
        ("What does glucose contain?", "glucose"),
        ('Who said "King"?', "King"),
        ("Is the Paris-based firm old?", "Paris"),
        ("Norway's Oslo is", "Oslo"),
        ("Ada.", "Ada"),
        ("Where is Oslo? Ada lives there.", "Ada"),
    ],
)
def test_a_name_that_is_whole(text, name):
    assert stands(text, name) is Standing.WHOLE


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Where does Paris Hilton live?", "Paris"),
        ("Where does Paris Hilton live?", "Hilton"),
        ("Curtis King plays", "King"),
        ("Lower Austria shares a border with", "Austria"),
        ("Who is the Premier of Queensland?", "Queensland"),
        ("the Constitution of the Netherlands", "Netherlands"),
        ("Where is the House of Lords?", "House"),
        ("Who made the iPhone 5?", "iPhone"),
        ("Who made the iPod Mini?", "Mini"),
        ("What is GPT-4?", "GPT"),
        ("2008 Oslo attack is", "Oslo"),
        ("USS Oslo was", "Oslo"),
        ("Who is Jean-Yves?", "Jean"),
        ("Who is Jean-Yves?", "Yves"),
        ("dark nebula is a part of", "nebula"),
        ("Vertebral column is part of", "column"),
    ],
)
def test_a_name_that_is_a_part_of_a_longer_one(text, name):
    assert stands(text, name) is Standing.PART_OF_A_NAME


@pytest.mark.parametrize(
    ("text", "name"), [("Parisian", "Paris"), ("Hibernian L.F.C. is", "L"), ("L'Abbaye is", "L"), ("Windows 8.1", "8")]
)
def test_a_name_that_is_a_part_of_a_word(text, name):
    assert stands(text, name) is Standing.PART_OF_A_WORD


def test_what_is_asked_about_a_name_is_no_part_of_it():
    assert stands("Who is the President of Nicaragua?", "Nicaragua", told={"president"}) is Standing.WHOLE
    assert stands("Who is the President of Nicaragua?", "Nicaragua", told={"capital"}) is Standing.PART_OF_A_NAME
    assert stands("Is Detroit City Hall old?", "Detroit", told={"city"}) is Standing.PART_OF_A_NAME


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("Where Does Paris Hilton Live?", "Paris", Standing.PART_OF_A_NAME),
        ("Where Does Ada Live?", "Ada", Standing.WHOLE),
        ("What Is The Capital Of Oslo", "Oslo", Standing.WHOLE),
        ("Player Ada Byron", "Ada Byron", Standing.WHOLE),
    ],
)
def test_capitals_that_were_put_there_say_nothing(text, name, found):
    assert stands(text, name, has_capitals=False) is found


def test_a_script_without_capitals_tells_nothing():
    assert stands("東京の首都", "東京") is Standing.UNTOLD


@given(st.sampled_from(sorted(OPENERS)), st.sampled_from(["does", "of", "with", "and"]))
def test_no_common_word_makes_a_name_longer(opener, word):
    assert stands(f"{opener.capitalize()} Ada {word} it", "Ada") is Standing.WHOLE


@given(st.text(max_size=60), st.text(max_size=60), st.booleans())
def test_any_text_is_told(before, after, has_capitals):
    assert stands(f"{before}Ada{after}", "Ada", has_capitals=has_capitals) in Standing
