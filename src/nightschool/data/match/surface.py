"""Whether an answer is the expected one, by its wording alone: where there is no question, or one in a language without rules.

Equal words are always correct. Otherwise:

An expected answer of up to five words must stand in the first sentence of the answer, once, at the beginning or end
of a clause. It does not count there
- beside a negation or a hedge (`not Oslo`, `Oslo or Bergen`, `maybe Oslo`),
- as one item of a bare list (`Oslo, Bergen, Paris`), nor in a sentence that goes on for long,
- as a part of a longer name or number (`York` in `New York`, `5` in `5 million`),
- if a later sentence takes it back (`Oslo. No, Bergen.`).

A longer one needs a token F1 of 0.8 and, so that one wrong word in a long sentence is not forgiven, the same numbers
and names in the same order, the same negations, and below twenty words every word that carries meaning.
"""

from __future__ import annotations

import re
from collections import Counter

from nightschool.data.match.tables import (
    ASSENTS,
    CONJUNCTIONS,
    FUNCTION_WORDS,
    HEDGES,
    INTERJECTIONS,
    MAGNITUDES,
    TAKES_BACK,
)
from nightschool.data.match.text import EDGES, clean, fold, negated, sentences, token_f1, tokens, words

SHORT_WORDS = 5
F1_NEEDED = 0.8
EVERY_WORD_BELOW = 20
EXTRA_WORDS = 15
"""How many words the first sentence may have beside a short expected answer."""

_CLAUSE_END = re.compile(r"[,;:]\s+|\s+[-–—]+\s+|\s*[()]\s*")


def gives(answer: str, expected: str) -> bool:
    """Whether `answer` gives the `expected` answer, by the rules above."""
    wanted = words(expected)
    if not wanted:
        return clean(answer).strip().casefold() == clean(expected).strip().casefold()
    if words(answer) == wanted:
        return True
    if len(wanted) <= SHORT_WORDS:
        return _gives_short(answer, expected, wanted)
    # A right answer may be followed by more sentences than were expected, but not by one that is almost the same.
    said, length = sentences(answer), len(sentences(expected))
    rest = said[length:]
    if any(token_f1(words(later), wanted) >= F1_NEEDED and not _gives_long(later, expected) for later in rest):
        return False
    return any(_gives_long(text, expected) for text in (answer, " ".join(said[:length])))


def _gives_short(answer: str, expected: str, wanted: list[str]) -> bool:
    said = sentences(answer)
    while said and set(words(said[0])) <= INTERJECTIONS - set(wanted):
        said = said[1:]
    if not said or any(words(later)[0] in TAKES_BACK for later in said[1:]):
        return False
    if len(said) > 1 and all(len(words(sentence)) <= max(2, len(wanted)) for sentence in said):
        return False  # one word a line: a list
    clauses = [clause for part in _CLAUSE_END.split(said[0]) if (clause := words(part))]
    if negated(wanted[:1]) or set(wanted) <= ASSENTS:
        return clauses[0] == wanted  # "No idea." must not pass for "No."
    while len(clauses) > 1 and set(clauses[0]) <= INTERJECTIONS - set(wanted):
        clauses = clauses[1:]
    flat = [word for clause in clauses for word in clause]
    beside = list((Counter(flat) - Counter(wanted)).elements())
    if len(beside) > EXTRA_WORDS or negated(beside) or set(beside) & HEDGES:
        return False
    return _stands_alone(said[0], expected, wanted, clauses, flat)


def _stands_alone(sentence: str, expected: str, wanted: list[str], clauses: list[list[str]], flat: list[str]) -> bool:
    """Whether the expected words stand once, at the edge of a clause, and not as part of a list, name or number."""
    starts = [i for i in range(len(flat) - len(wanted) + 1) if flat[i : i + len(wanted)] == wanted]
    if len(starts) != 1:
        return False
    if len(clauses) > 1 and wanted in clauses and all(len(clause) <= 2 for clause in clauses):
        return False
    begin, end = starts[0], starts[0] + len(wanted)
    edges, position = set(), 0
    for clause in clauses:
        edges |= {("begin", position), ("end", position + len(clause))}
        position += len(clause)
    continues = flat[end : end + 1]
    if ("begin", begin) not in edges and ("end", end) not in edges and not set(continues) & CONJUNCTIONS:
        return False
    before = flat[begin - 1] if begin and ("begin", begin) not in edges else ""
    after = flat[end] if end < len(flat) and ("end", end) not in edges else ""
    if before == "and" or (after == "and" and len(flat) - end <= 3):
        return False
    return not (_longer_number(before, wanted, after) or _longer_name(sentence, expected, before, after))


def _longer_number(before: str, wanted: list[str], after: str) -> bool:
    numeric = [any(c.isdigit() for c in word) for word in (before, wanted[0], wanted[-1], after)]
    return (numeric[2] and (after in MAGNITUDES or numeric[3])) or (numeric[1] and numeric[0])


def _longer_name(sentence: str, expected: str, before: str, after: str) -> bool:
    """Whether a capitalised expected answer has a further capitalised word beside it, as `York` in `New York`."""
    if not any(token.strip(EDGES)[:1].isupper() for token in tokens(expected)):
        return False
    capitalised = {fold(token) for token in tokens(sentence) if token.strip(EDGES)[:1].isupper()}
    return any(word in capitalised and word not in FUNCTION_WORDS for word in (before, after) if word)


def _gives_long(answer: str, expected: str) -> bool:
    said, wanted = words(answer), words(expected)
    if token_f1(said, wanted) < F1_NEEDED or negated(said) != negated(wanted):
        return False
    if [w for w in said if _has_digit(w)] != [w for w in wanted if _has_digit(w)]:
        return False
    names = _names(expected)
    if [w for w in said if w in names] != [w for w in wanted if w in names]:
        return False
    return len(wanted) >= EVERY_WORD_BELOW or not set(wanted) - FUNCTION_WORDS - set(said)


def _has_digit(word: str) -> bool:
    return any(character.isdigit() for character in word)


def _names(text: str) -> set[str]:
    """Capitalised words, without those that only begin a sentence as `The` does."""
    capitalised = {fold(token) for token in tokens(text) if token.strip(EDGES)[:1].isupper()}
    return capitalised - FUNCTION_WORDS
