"""What an expected answer adds to its question: the names, numbers and words that carry the fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nightschool.data.match.english import Token, is_plain, is_verb, kin, read
from nightschool.data.match.tables import AUXILIARIES, ENGLISH, READ_AS

_PREPOSITIONS = frozenset("by in at on from to with of as for near into every before after".split())  # noqa: SIM905
_RATES = frozenset(("a", "an", "per", "each", "every"))


@dataclass(frozen=True)
class Part:
    """Words that stand together. `is_name` if they are written with capitals."""

    stems: tuple[str, ...]
    is_name: bool


@dataclass(frozen=True)
class Key:
    """All parts of a fact, the question that it answers and the whole expected answer, as words."""

    parts: tuple[Part, ...]
    question: tuple[Token, ...]
    expected: tuple[Token, ...]

    @property
    def stems(self) -> frozenset[str]:
        return frozenset(stem for part in self.parts for stem in part.stems)

    def is_known(self, token: Token) -> bool:
        """Whether a word says nothing that question and expected answer do not."""
        return any(kin(token.stem, known.stem) for known in (*self.question, *self.expected))


def is_english(question: str) -> bool:
    """Whether the rules of this language can be used."""
    return any(token.word in ENGLISH for token in read(question))


def key_of(question: str, expected: str) -> Key | None:
    """The key of an answer to an English question; None if it adds nothing to it."""
    asked, said = read(question), read(expected)
    new = _new(asked, said)
    kind = _kind(asked)
    if kind == "who" and any(token.is_name for place, token in enumerate(said) if place in new):
        new = {place for place in new if said[place].is_name}
    if kind == "many" and sum(said[place].is_number for place in new) == 1:
        new = {place for place in new if said[place].is_number}
    new -= _rate(said, new)
    parts = _runs(said, new)
    return Key(parts, tuple(asked), tuple(said)) if parts else None


def _kind(asked: Sequence[Token]) -> str:
    words = [token.word for token in asked]
    if any(word in ("who", "whom", "whose") for word in words):
        return "who"
    return "many" if ("how", "many") in pairwise(words) else ""


def _new(asked: Sequence[Token], said: Sequence[Token]) -> set[int]:
    """The places of what is new in the expected answer, without verbs that only join it to what was asked."""
    content = [token for token in asked if token.is_content]
    names = {token.stem for token in asked if token.is_name}
    known = {place for place, token in enumerate(said) if any(kin(token.stem, one.stem) for one in content)}
    new = {place for place, token in enumerate(said) if token.is_content} - known
    # Of a name that holds one of the question, all is new: `Toyota City` is no city.
    for place in sorted(new):
        for beside in (place - 1, place + 1):
            if 0 <= beside < len(said) and said[place].is_name and said[beside].is_name and said[beside].stem in names:
                new.add(beside)
    verb = next((place for place, token in enumerate(said) if is_verb(token)), None)
    if verb is None or any(token.word == "why" for token in asked):  # a reason is a sentence of its own
        return new
    new -= {place for place in new if _is_joining(said, place, verb)} if len(new) > 1 else set()
    before, after = ({p for p in new if p < verb}, {p for p in new if p > verb})
    if not before or not after:
        return new
    asked_before = any(place < verb for place in known)
    asked_after = any(place > verb for place in known)
    if asked_before:
        return after
    return before if asked_after else new


def _is_joining(said: Sequence[Token], place: int, verb: int) -> bool:
    """Whether a word is a verb that carries nothing: `lives`, or `delivered` in `are delivered by`."""
    token = said[place]
    if is_verb(token) or (place == 0 and is_plain(token)):
        return True
    follows = said[place + 1].word if place + 1 < len(said) else ""
    is_participle = token.word.endswith(("ed", "en", "wn")) or token.word in READ_AS or token.word in READ_AS.values()
    return place - verb == 1 and said[verb].word in AUXILIARIES and is_participle and follows in _PREPOSITIONS


def _rate(said: Sequence[Token], new: set[int]) -> set[int]:
    """The places of `day` in `20 cents a day`: what an amount is for goes without saying."""
    return {
        place
        for place in new
        if place > 2 and said[place - 1].word in _RATES and any(said[one].is_number for one in (place - 2, place - 3))
    }


def _runs(said: Sequence[Token], new: set[int]) -> tuple[Part, ...]:
    runs: list[list[int]] = []
    for place in sorted(new):
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return tuple(Part(tuple(said[p].stem for p in run), all(said[p].is_name for p in run)) for run in runs)
