"""Yes or no: what an English answer says to a question that asks for one of the two."""

from __future__ import annotations

from collections.abc import Sequence

from nightschool.data.match.english import Token, read
from nightschool.data.match.stated import restates
from nightschool.data.match.tables import AUXILIARIES, CONTRARY, DENIED, UNSURE
from nightschool.data.match.text import negated, sentences

_YES = frozenset(("yes", "yeah", "yep", "certainly", "sure"))
_NO = frozenset(("no", "nope"))
_NO_IDEA = frozenset(("idea", "clue", "information", "knowledge", "answer", "one"))


def polarity_of(text: str) -> bool | None:
    """What the first word says: True for yes, False for no, None for neither."""
    words = [token.word for token in read(text) if not token.is_mark]
    if not words or set(words[1:2]) & _NO_IDEA:
        return None
    return True if words[0] in _YES else False if words[0] in _NO else None


def asks_for_one(question: str) -> bool:
    """Whether a question can be answered by yes or no."""
    words = [token.word for token in read(question) if not token.is_mark]
    return bool(words) and words[0] in AUXILIARIES


def without_polarity(text: str) -> str:
    """The text behind a first `Yes,` or `No.`; the empty string if there is nothing else."""
    if polarity_of(text) is None:
        return text
    return text.lstrip().partition(" ")[2].strip()


def says(answer: str, question: str, *, yes: bool) -> bool:
    """Whether an answer says the one and nowhere the other."""
    asked = read(question)
    said = [_of_piece(read(sentence), asked) for sentence in sentences(answer)]
    first = polarity_of(answer)
    if first is not None:
        told = [token for token in read(sentences(answer)[0])[1:] if token.is_content]
        if len(told) > 1 and restates(told, asked) == 0:
            return False  # `No, the child is in the sun.`
        # `No, it is.` says both.
        said = [first, *(one for one in said if one is not None)]
    heard = {one for one in said if one is not None}
    return heard == {yes} and not _is_unsure(read(sentences(answer)[0]))


def _of_piece(tokens: Sequence[Token], asked: Sequence[Token]) -> bool | None:
    """What a sentence says that repeats the whole question as a statement."""
    words = [token.word for token in tokens]
    if restates(tokens, asked) < 1:
        return None
    return not (negated(words) or bool(set(words) & DENIED))


def _is_unsure(tokens: Sequence[Token]) -> bool:
    return any(token.word in UNSURE or token.word in CONTRARY - {"no", "actually"} for token in tokens)
