"""Passages and their sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.memory.facts.passages import sentences_of


@pytest.mark.parametrize(
    ("passage", "sentences"),
    [
        ("Ada lives in Oslo. Bob likes tea!", ["Ada lives in Oslo.", "Bob likes tea!"]),
        ("Really?! Yes… No.", ["Really?!", "Yes…", "No."]),
        ("J. R. Tolkien met Dr. Who. Mrs. Dalloway did not.", ["J. R. Tolkien met Dr. Who.", "Mrs. Dalloway did not."]),
        ("It weighs 3.5 kg, e.g. as a parcel. 7 came.", ["It weighs 3.5 kg, e.g. as a parcel.", "7 came."]),
        ("- one\n\n  - two\r\n", ["- one", "- two"]),
        (" \n ", []),
    ],
)
def test_a_passage_is_split_behind_its_sentences(passage, sentences):
    assert sentences_of(passage) == sentences


@given(st.text(st.sampled_from("aA1 .!?…\n\t\u2028\u00a0D"), max_size=60))
def test_nothing_is_lost_and_nothing_is_blank(passage):
    found = sentences_of(passage)
    assert "".join("".join(found).split()) == "".join(passage.split())
    assert all(one == one.strip() != "" for one in found)


def test_long_passages_of_one_sign_are_split_at_once():
    for sign in (".", " ", ". ", "A.", "\n", "A. "):
        sentences_of(sign * 50_000)
