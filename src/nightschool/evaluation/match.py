"""Whether an answer is the expected one. No model judges: the same two texts always give the same verdict.

Both texts are normalised (`words`): Unicode NFKC, curly quotes made straight, case folded, white space collapsed,
punctuation at the edges of words dropped, English articles dropped, and characters of
Chinese and Japanese taken as words. Equal words are always correct. Otherwise:

An expected answer of up to five words must stand in the first sentence of the answer, once, at the beginning or end
of a clause. It does not count there
- beside a negation or a hedge (`not Oslo`, `Oslo or Bergen`, `maybe Oslo`),
- as one item of a bare list (`Oslo, Bergen, Paris`), nor in a sentence that goes on for long,
- as a part of a longer name or number (`York` in `New York`, `5` in `5 million`),
- if a later sentence takes it back (`Oslo. No, Bergen.`).

A longer one needs a token F1 of 0.8 and, so that one wrong word in a long sentence is not forgiven, the same numbers
and names in the same order, the same negations, and below twenty words every word that carries meaning.

In doubt the verdict is "wrong": a wrong model that is let through costs more than a right one that is asked again.

General questions are judged by `mentions` instead: nobody taught their answers, so a model says them in words of its
own, and what counts is whether it still knows them. A verdict that depends on the wording would find losses where only
the style changed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

SHORT_WORDS = 5
F1_NEEDED = 0.8
EVERY_WORD_BELOW = 20
EXTRA_WORDS = 15
"""How many words the first sentence may have beside a short expected answer."""


def _word_list(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ARTICLES = _word_list("a an the")
_NEGATIONS = _word_list(
    "not no never neither nor none nobody nothing cannot without except unlike nicht kein keine pas "
    "jamais nunca jamás niet geen inte ikke nie не нет"
)
_HEDGES = _word_list("or either but instead rather than maybe perhaps possibly probably formerly oder ou vielleicht")
_TAKES_BACK = _word_list("no not actually sorry wait or correction")
_ASSENTS = _word_list("yes yeah sure ok okay certainly")
_INTERJECTIONS = _ASSENTS | _word_list("well right")
_CONJUNCTIONS = _word_list("and where who which because since while when")
_MAGNITUDES = _word_list("hundred thousand million billion trillion dozen percent")
_FUNCTION_WORDS = _word_list(
    "a an the i you he she it we they his her its their my your our this that these those there here in "
    "on at to of for from by with as into and is are was were be been being am do does did has have had "
    "will would can could may might shall should who whom which what where when how"
)
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_SPACED_MARKS = {ord(wide): f"{mark} " for wide, mark in zip("，、；。！？", ",,;.!?", strict=True)}
_STRAIGHT_MARKS = str.maketrans("’‘“”−", "''\"\"-")
_EDGES = "\"'`.,:;!?…()[]{}<>«»„“”‘’*_~¿¡|–—"
_CJK = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
# A full stop after a capital and at most one more letter belongs to an initial or a title: J. R. R. Tolkien, Dr. No.
_SENTENCE_END = re.compile(r"\n+|(?:(?<![\s.][A-Z])(?<![\s.][A-Z][a-z])(?<!^[A-Z])(?<!^[A-Z][a-z])\.|[!?…])+(?:\s+|$)")
_CLAUSE_END = re.compile(r"[,;:]\s+|\s+[-–—]+\s+|\s*[()]\s*")


def is_correct(answer: str, expected: str) -> bool:
    """Whether `answer` gives the `expected` answer, by the rules above."""
    wanted = words(expected)
    if not wanted:
        return _clean(answer).strip().casefold() == _clean(expected).strip().casefold()
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


def mentions(answer: str, expected: str) -> bool:
    """Whether a sentence of `answer` that denies nothing has the words of `expected` in their order, `3` as `three`."""
    wanted = _numbered(expected)
    said = [_numbered(sentence) for sentence in sentences(answer)]
    return bool(wanted) and any(
        found[start : start + len(wanted)] == wanted
        for found in said
        if not _negated(found) or _negated(wanted)
        for start in range(len(found) - len(wanted) + 1)
    )


def words(text: str) -> list[str]:
    """The normalised words of a text. In `The answer is A.` the last word is not an article."""
    tokens = _tokens(text)
    following = [*tokens[1:], ""][: len(tokens)]
    found = [_word(token) for token, after in zip(tokens, following, strict=True) if not _is_article(token, after)]
    return [word for word in found if word]


def sentences(text: str) -> list[str]:
    """The sentences of a text, also split at line ends, with their closing marks; blank ones are left out."""
    clean = _clean(text).strip()
    found, start = [], 0
    for match in _SENTENCE_END.finditer(clean):
        found.append(clean[start : match.end()].strip())
        start = match.end()
    found.append(clean[start:].strip())
    return [sentence for sentence in found if words(sentence)]


def token_f1(answer: Sequence[str], expected: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as it occurs; 0…1."""
    shared = (Counter(answer) & Counter(expected)).total()
    return 2 * shared / (len(answer) + len(expected)) if shared else 0.0


def _clean(text: str) -> str:
    straight = unicodedata.normalize("NFKC", text.translate(_SPACED_MARKS)).translate(_STRAIGHT_MARKS)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", straight)


def _tokens(text: str) -> list[str]:
    return _CJK.sub(r" \1 ", _clean(text)).split()


def _is_article(token: str, following: str) -> bool:
    return token.lstrip(_EDGES).casefold() in _ARTICLES and bool(_word(following))


def _word(token: str) -> str:
    """A token without the punctuation at its edges, folded; a minus before a digit stays."""
    bare = token.strip(_EDGES)
    return (bare if re.match(r"-\d", bare) else bare.strip("-" + _EDGES)).casefold()


def _numbered(text: str) -> list[str]:
    return [_DIGITS.get(word, word) for word in words(text)]


def _negated(found: Sequence[str]) -> bool:
    return any(word in _NEGATIONS or word.endswith("n't") for word in found)


def _gives_short(answer: str, expected: str, wanted: list[str]) -> bool:
    said = sentences(answer)
    while said and set(words(said[0])) <= _INTERJECTIONS - set(wanted):
        said = said[1:]
    if not said or any(words(later)[0] in _TAKES_BACK for later in said[1:]):
        return False
    if len(said) > 1 and all(len(words(sentence)) <= max(2, len(wanted)) for sentence in said):
        return False  # one word a line: a list
    clauses = [clause for part in _CLAUSE_END.split(said[0]) if (clause := words(part))]
    if _negated(wanted[:1]) or set(wanted) <= _ASSENTS:
        return clauses[0] == wanted  # "No idea." must not pass for "No."
    while len(clauses) > 1 and set(clauses[0]) <= _INTERJECTIONS - set(wanted):
        clauses = clauses[1:]
    flat = [word for clause in clauses for word in clause]
    beside = list((Counter(flat) - Counter(wanted)).elements())
    if len(beside) > EXTRA_WORDS or _negated(beside) or set(beside) & _HEDGES:
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
    if ("begin", begin) not in edges and ("end", end) not in edges and not set(continues) & _CONJUNCTIONS:
        return False
    before = flat[begin - 1] if begin and ("begin", begin) not in edges else ""
    after = flat[end] if end < len(flat) and ("end", end) not in edges else ""
    if before == "and" or (after == "and" and len(flat) - end <= 3):
        return False
    return not (_longer_number(before, wanted, after) or _longer_name(sentence, expected, before, after))


def _longer_number(before: str, wanted: list[str], after: str) -> bool:
    numeric = [any(c.isdigit() for c in word) for word in (before, wanted[0], wanted[-1], after)]
    return (numeric[2] and (after in _MAGNITUDES or numeric[3])) or (numeric[1] and numeric[0])


def _longer_name(sentence: str, expected: str, before: str, after: str) -> bool:
    """Whether a capitalised expected answer has a further capitalised word beside it, as `York` in `New York`."""
    if not any(token.strip(_EDGES)[:1].isupper() for token in _tokens(expected)):
        return False
    capitalised = {_word(token) for token in _tokens(sentence) if token.strip(_EDGES)[:1].isupper()}
    return any(word in capitalised and word not in _FUNCTION_WORDS for word in (before, after) if word)


def _gives_long(answer: str, expected: str) -> bool:
    said, wanted = words(answer), words(expected)
    if token_f1(said, wanted) < F1_NEEDED or _negated(said) != _negated(wanted):
        return False
    if [w for w in said if _has_digit(w)] != [w for w in wanted if _has_digit(w)]:
        return False
    names = _names(expected)
    if [w for w in said if w in names] != [w for w in wanted if w in names]:
        return False
    return len(wanted) >= EVERY_WORD_BELOW or not set(wanted) - _FUNCTION_WORDS - set(said)


def _has_digit(word: str) -> bool:
    return any(character.isdigit() for character in word)


def _names(text: str) -> set[str]:
    """Capitalised words, without those that only begin a sentence as `The` does."""
    capitalised = {_word(token) for token in _tokens(text) if token.strip(_EDGES)[:1].isupper()}
    return capitalised - _FUNCTION_WORDS
