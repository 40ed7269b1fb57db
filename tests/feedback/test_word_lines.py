"""Lines that hold certain words are all found, whatever the case, the escapes and the letters beside them."""

import json
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nightschool.feedback.word_lines import FOLDED, WordLines

PIECES = ["ada", "Ada", "ADA", "oslo", "stra\u00dfe", "STRASSE", "\u212aim", "kim", "\u0130da", "77", "1977", "\u00e9ada",
          "a_da", "\n", "\t", '"', "\\", "\u201c", "\u00e9", " ", " ", "-"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def words_of(text):
    return re.findall(r"\w+", text.casefold())


@given(
    st.lists(TEXTS, max_size=6),
    st.lists(st.sampled_from(["ada", "oslo", "strasse", "kim", "77", "\u00e9"]), max_size=2),
    st.booleans(),
)
@example(["\nada"], ["ada"], True)
@example(["\u201cada"], ["ada"], True)
@settings(max_examples=300, deadline=None)
def test_no_line_that_has_all_words_is_left_out(texts, words, escapes):
    content = "".join(json.dumps({"text": text}, ensure_ascii=escapes) + "\n" for text in texts).encode()
    found = {json.loads(line)["text"] for line in WordLines(words).of(content)}
    assert found <= set(texts)
    assert {text for text in texts if set(words) <= set(words_of(text))} <= found


def test_lines_without_the_words_are_not_read():
    content = b"".join(json.dumps({"text": f"Person {n} lives in Town {n % 7}"}).encode() + b"\n" for n in range(500))
    found = list(WordLines(["person", "77", "town", "0"]).of(content))
    assert [json.loads(line)["text"] for line in found] == ["Person 77 lives in Town 0"]


def test_every_character_that_hides_letters_is_known():
    assert sorted(FOLDED) == [chr(n) for n in range(0x80, 0x30000) if re.search("[a-z]", chr(n).casefold())]
