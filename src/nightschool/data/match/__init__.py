"""Whether an answer is the expected one. No model judges: the same texts always give the same verdict.

The verdict rests on what the expected answer adds to its question (`key.py`): `Brightwell ships orders from Nordpost` gives
`Brightwell parcels are delivered by Nordpost` as an answer to `Who ships orders from Brightwell?`. The key must be stated
(`stated.py`), numbers, units, dates, plurals and accents in any writing (`english.py`), and nothing may make it doubtful: a denial,
a hedge, other candidates, a longer name or number, something that takes it back. What is asked by yes or no is
answered by either (`polarity.py`). An example may name its key itself, and answers that are as right.

Without a question, in another language, or where the answer adds nothing to the question, the wording decides (`surface.py`).

In doubt the verdict is "wrong": a wrong model that is let through costs more than a right one that is asked again.

General questions are judged by `mentions` instead: nobody taught their answers, and what counts is whether a model still
knows them. A verdict that depends on the wording would find losses where only the style changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from nightschool.data.match import polarity, surface
from nightschool.data.match.key import is_english, key_of
from nightschool.data.match.stated import states
from nightschool.data.match.text import negated, sentences, token_f1, words

__all__ = ["RULES", "is_correct", "mentions", "sentences", "token_f1", "words"]

RULES = 1
"""The number of these rules, kept beside what they judged."""

_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def is_correct(
    answer: str, expected: str, *, question: str = "", key: Sequence[str] = (), alternatives: Sequence[str] = ()
) -> bool:
    """Whether `answer` gives the `expected` answer, or one of the alternatives.

    Args:
        answer: What a model said.
        expected: What was taught.
        question: What it was asked. Without it, the wording decides.
        key: What has to be said, all of it, where the example names it.
        alternatives: Other answers that are as right.
    """
    whole = (expected, *alternatives)
    if any(words(answer) == words(one) != [] for one in whole):
        return True
    if key:
        given = all(_gives(answer, _with_reason(part, expected), question) for part in key)
        return given or any(_gives(answer, one, question) for one in alternatives)
    return any(_gives(answer, one, question) for one in whole)


def mentions(answer: str, expected: str) -> bool:
    """Whether a sentence of `answer` that denies nothing has the words of `expected` in their order, `3` as `three`."""
    wanted = _numbered(expected)
    said = [_numbered(sentence) for sentence in sentences(answer)]
    return bool(wanted) and any(
        found[start : start + len(wanted)] == wanted
        for found in said
        if not negated(found) or negated(wanted)
        for start in range(len(found) - len(wanted) + 1)
    )


def _numbered(text: str) -> list[str]:
    return [_DIGITS.get(word, word) for word in words(text)]


def _gives(answer: str, expected: str, question: str) -> bool:
    """Whether an answer to the question gives one expected answer."""
    if not words(answer) or not question or not is_english(question):
        return surface.gives(answer, expected)
    wanted = polarity.polarity_of(expected)
    if wanted is not None and polarity.asks_for_one(question):
        return _decides(answer, expected, question, yes=wanted)
    key = key_of(question, expected)
    return surface.gives(answer, expected) if key is None else states(answer, key)


def _with_reason(part: str, expected: str) -> str:
    """A key that is a bare yes or no, with what the expected answer says beside it."""
    wanted = polarity.polarity_of(part)
    is_bare = wanted is not None and not polarity.without_polarity(part)
    return expected if is_bare and polarity.polarity_of(expected) == wanted else part


def _decides(answer: str, expected: str, question: str, *, yes: bool) -> bool:
    """Whether an answer says the yes or no that is expected, or the reason that is expected with it."""
    if polarity.says(answer, question, yes=yes):
        return True
    reason = polarity.without_polarity(expected)
    if not reason or polarity.polarity_of(answer) not in (None, yes):
        return False
    key = key_of(question, reason)
    return key is not None and states(answer, key)
