"""Whether an English answer states the key of a fact, and what speaks against it. In doubt, it does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from nightschool.data.match.english import Token, is_verb, kin, read, same
from nightschool.data.match.key import Key, Part
from nightschool.data.match.tables import (
    COMPANY,
    COMPARED,
    COMPARED_BEHIND,
    CONTRARY,
    ENGLISH,
    INTERJECTIONS,
    MAGNITUDES,
    MONTHS,
    PRONOUNS,
    SMALL_WORDS,
    TAKES_BACK,
    TITLES,
    UNSURE,
)
from nightschool.data.match.text import negated, sentences

# What follows says something of its own: more about the value, or the contrary.
_PIECE_END = re.compile(
    r"[,;]?\s+(?=(?:but|however|although|though|while|whereas|because)\b)|[,;]\s+(?=(?:which|who|where|so|and\s+(?:it|he|she|they|is|has))\b)|;\s+",
    re.IGNORECASE,
)
# Words that a value may have beside it where less than half of the question is said again.
_MANY_WORDS = 4
_MOST_BESIDE_A_PART = 2
_HALF, _RESTATED = 0.5, 0.7
# `No, it is Oslo.` denies what was asked before, not what follows.
_EMPTY = INTERJECTIONS | {"no"}
_END = Token(";")


class Piece(NamedTuple):
    """A part of an answer that says something of its own, and the number of its sentence."""

    tokens: tuple[Token, ...]
    sentence: int


@dataclass(frozen=True)
class Statement:
    """The piece of an answer that has the whole key: its words, where the parts are, and the other pieces."""

    key: Key
    piece: Piece
    places: frozenset[int]
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]

    @property
    def tokens(self) -> tuple[Token, ...]:
        return self.piece.tokens

    @property
    def first(self) -> int:
        return min(self.places)

    @property
    def last(self) -> int:
        return max(self.places)

    @property
    def about(self) -> float:
        """Which share of the question its sentence says again."""
        same_sentence = [one for one in (*self.before, self.piece, *self.after) if one.sentence == self.piece.sentence]
        return restates([token for piece in same_sentence for token in piece.tokens], self.key.question)


def states(answer: str, key: Key) -> bool:
    """Whether the answer states all parts of the key, and nothing that makes it doubtful."""
    found = _find(_pieces(answer), key)
    if found is None and len(key.parts) > 1 and "\n" in answer:
        # The items of a list, one a line.
        found = _find([Piece(tuple(read(re.sub(r"\s*\n\s*(?:[-*]|\d+\.)?\s*", ", ", answer.strip()))), 0)], key)
    return found is not None and not any(doubt(one) for one in _each(found) for doubt in DOUBTS.values())


def restates(tokens: Sequence[Token], question: Sequence[Token]) -> float:
    """Which share of the words of a question that carry meaning is in a piece."""
    content = [token for token in question if token.is_content]
    if not content:
        return 0.0
    return sum(any(kin(one.stem, token.stem) for token in tokens) for one in content) / len(content)


def _pieces(answer: str) -> list[Piece]:
    pieces = [
        Piece(tuple(read(piece)), number)
        for number, sentence in enumerate(sentences(answer))
        for piece in _PIECE_END.split(sentence)
    ]
    if pieces and len(pieces[0].tokens) > 2 and pieces[0].tokens[0].word in _EMPTY and pieces[0].tokens[1].stem == ",":
        pieces[0] = Piece(pieces[0].tokens[2:], 0)
    return [piece for piece in pieces if piece.tokens]


def _find(pieces: Sequence[Piece], key: Key) -> Statement | None:
    for number, piece in enumerate(pieces):
        places = [_place(piece.tokens, part) for part in key.parts]
        if all(places):
            together = frozenset(place for part in places for place in part)
            return Statement(key, piece, together, tuple(pieces[:number]), tuple(pieces[number + 1 :]))
    return None


def _each(said: Statement) -> list[Statement]:
    """The statement, and the same for each further place in its piece where a key of one word stands: all must be free of doubt."""
    if len(said.key.parts) != 1 or len(said.key.parts[0].stems) != 1:
        return [said]
    (stem,) = said.key.parts[0].stems
    return [
        replace(said, places=frozenset((place,))) for place, token in enumerate(said.tokens) if token.stem == stem
    ] or [said]


def _place(tokens: Sequence[Token], part: Part) -> frozenset[int]:
    """Where the words of a part stand near each other, the shortest stretch; nowhere where they do not."""
    best: frozenset[int] = frozenset()
    words = [place for place, token in enumerate(tokens) if not token.is_mark]
    for start in range(len(words)):
        window = words[start : start + len(part.stems) + (0 if part.is_name else _MOST_BESIDE_A_PART)]
        found = set()
        for stem in part.stems:
            one = next((p for p in window if p not in found and _is(tokens[p], stem, part)), None)
            if one is not None:
                found.add(one)
        if len(found) == len(part.stems) and (not best or max(found) - min(found) < max(best) - min(best)):
            best = frozenset(found)
    return best


def _is(token: Token, stem: str, part: Part) -> bool:
    return same(token.stem, stem) if part.is_name and len(part.stems) > 1 else token.stem == stem


# --- what makes a statement doubtful -----------------------------------------------------------------------------------------


def _denied(said: Statement) -> bool:
    wanted = negated([token.word for token in said.key.expected])
    return negated([token.word for token in said.tokens]) != wanted


def _unsure(said: Statement) -> bool:
    words = {token.word for token in said.tokens} - {token.word for token in (*said.key.expected, *said.key.question)}
    near = {token.word for token in said.tokens[max(0, said.first - 4) : said.last + 5]}
    return bool(words & UNSURE) or ("or" in near and "or" in words)


def _compared(said: Statement) -> bool:
    """`over 340`, `340 steps away`, `340 more`, which is another number or a number of something else."""
    known = {token.word for token in (*said.key.expected, *said.key.question)}
    behind = {token.word for token in said.tokens[said.last + 1 : said.last + 4]} - known
    if any(said.tokens[place].is_number for place in said.places) and behind & COMPARED_BEHIND:
        return True
    return any(
        said.tokens[place].is_number
        and place > 0
        and said.tokens[place - 1].word in COMPARED
        and said.tokens[place - 1].word not in {token.word for token in said.key.expected}
        for place in said.places
    )


def _among_others(said: Statement) -> bool:
    """The value is one of several that are listed, and the expected answer has no such others."""
    tokens = said.tokens
    if any(not said.key.is_known(token) for token in _items_within(said)):
        return True
    end, before = _behind_aside(tokens, said.last + 1), tokens[max(0, said.first - 1) : said.first]
    after = tokens[end : end + 1]
    if after and after[0].stem in ("and", "or", ","):
        rest = tokens[end + 1 :]
        if after[0].stem == ",":
            return _lists(said, rest)
        if rest and not _begins_clause(rest[0]) and not said.key.is_known(rest[0]):
            return True
    if not before or before[0].word not in ("and", "or"):
        return _follows_a_list(said)
    earlier = [token for token in tokens[: said.first - 1] if token.is_content]
    return bool(earlier) and not said.key.is_known(earlier[-1]) and not is_verb(earlier[-1])


def _behind_aside(tokens: Sequence[Token], place: int) -> int:
    """The place behind what stands in brackets at a place, or this one: `carbon dioxide (CO2), methane`."""
    if [token.stem for token in tokens[place : place + 1]] != ["("]:
        return place
    return next((end + 1 for end in range(place, len(tokens)) if tokens[end].stem == ")"), place)


def _items_within(said: Statement) -> list[Token]:
    """Words between the parts of a key that stand as items of their own."""
    span = said.tokens[said.first : said.last + 1]
    items: list[list[tuple[int, Token]]] = [[]]
    for place, token in enumerate(span, start=said.first):
        if token.is_mark or token.word in ("and", "or"):
            items.append([])
        else:
            items[-1].append((place, token))
    own = [item for item in items if item and not any(place in said.places for place, _ in item)]
    return [token for item in own for _, token in item if token.is_content]


def _lists(said: Statement, rest: Sequence[Token]) -> bool:
    """Whether what follows the value and a comma is a further value."""
    item: list[Token] = []
    end = len(rest)
    for place, token in enumerate(rest):
        if token.is_mark or token.word in ("and", "or"):
            end = place
            break
        item.append(token)
    if not item:  # `, and …`
        return len(rest) > 1 and not _begins_clause(rest[1]) and not said.key.is_known(rest[1])
    if item[0].word in SMALL_WORDS or _begins_clause(item[0]) or item[0].word.endswith(("ly", "ing", "ed")):
        return False
    if all(said.key.is_known(token) for token in item if token.is_content):
        return False
    goes_on = end < len(rest) and rest[end].word in ("and", "or", ",")
    if not item[0].is_name:
        return len(item) <= 3
    # A place in a place: `Ottawa, Canada`. Without a verb it is a list.
    return goes_on or not any(is_verb(token) for token in said.tokens)


def _follows_a_list(said: Statement) -> bool:
    """`Bergen, Oslo`: a bare value before a comma."""
    before = said.tokens[: said.first]
    if not before or before[-1].stem != ",":
        return False
    content = [token for token in before if token.is_content and token.word not in INTERJECTIONS]
    bare = not any(is_verb(token) or token.word in SMALL_WORDS for token in before if not token.is_mark)
    return bool(content) and bare and not all(said.key.is_known(token) for token in content)


def _begins_clause(token: Token) -> bool:
    return token.word in PRONOUNS or is_verb(token) or token.word.endswith(("ed", "n't", "'s", "'re"))


def _from_to(said: Statement) -> bool:
    """`from the trumpet to the guitar`."""
    before = [token.word for token in said.tokens[max(0, said.first - 2) : said.first]]
    after = [token.word for token in said.tokens[said.last + 1 : said.last + 2]]
    return "from" in before and after == ["to"]


def _longer_name(said: Statement) -> bool:
    """`York` in `New York`, `Oslo` in `Oslo Airport`."""
    for part in said.key.parts:
        if not part.is_name:
            continue
        places = sorted(_place(said.tokens, part))
        for beside, known in ((places[0] - 1, TITLES), (places[-1] + 1, COMPANY)):
            if not 0 <= beside < len(said.tokens) or (beside == 0 and not said.tokens[beside].is_name):
                continue
            token = said.tokens[beside]
            if (
                token.is_name
                and token.word not in known
                and not said.key.is_known(token)
                and not _is_of_a_people(token)
            ):
                return True
    return False


def _is_of_a_people(token: Token) -> bool:
    """An adjective of a people: `Japanese`, `Danish`."""
    return token.word.endswith(("ese", "ish", "ian"))


def _longer_number(said: Statement) -> bool:
    """`5` in `5 million`, `7` in `7 20`."""
    for place in said.places:
        if not said.tokens[place].is_number:
            continue
        for beside in (place - 1, place + 1):
            if not 0 <= beside < len(said.tokens) or beside in said.places:
                continue
            token = said.tokens[beside]
            if beside > place and token.stem in MAGNITUDES and not said.key.is_known(token):
                return True
            in_date = any(one.word in MONTHS for one in said.tokens[max(0, place - 3) : place + 3])
            if token.is_number and not in_date:
                return True
    return False


def _other_amount(said: Statement) -> bool:
    """Another number of the same things, or the same amount for another thing: `$49 a bottle`."""
    things: dict[tuple[str, str], set[str]] = {}
    tokens = [*said.tokens, *(token for piece in said.after for token in piece.tokens)]
    for place, (token, following) in enumerate(pairwise(tokens)):
        if token.is_number and following.is_content and not following.is_number:
            # Degrees of one scale are not those of another.
            further = tokens[place + 2].stem if following.word.startswith("degree") and place + 2 < len(tokens) else ""
            things.setdefault((following.stem, further), set()).add(token.stem)
    wanted = {said.tokens[place].stem for place in said.places if said.tokens[place].is_number}
    if any(numbers & wanted and numbers - wanted for numbers in things.values()):
        return True
    behind = said.tokens[said.last + 1 : said.last + 3]
    return (
        bool(wanted)
        and said.tokens[said.last].is_content
        and len(behind) == 2
        and behind[0].word in ("a", "an", "per")
        and behind[1].is_content
        and not said.key.is_known(behind[1])
    )


def _taken_back(said: Statement) -> bool:
    """A later piece denies what was said, or says the same of another value."""
    for piece in said.after:
        words = [token.word for token in piece.tokens]
        if words[0] in TAKES_BACK or (words[0] in CONTRARY and (negated(words) or set(words) & UNSURE)):
            return True
        if _says_otherwise(said, piece.tokens):
            return True
    return False


def _says_otherwise(said: Statement, piece: Sequence[Token]) -> bool:
    """Whether a piece says again what was asked, with names or numbers that are not the key's."""
    if restates(piece, said.key.question) < _RESTATED or any(token.stem in said.key.stems for token in piece):
        return False
    if negated([token.word for token in piece]):
        return True
    return any(
        (token.is_name or token.is_number) and not said.key.is_known(token) for token in piece if not token.is_mark
    )


def _comes_late(said: Statement) -> bool:
    """Something else was answered first, or the value stands in a long sentence about something else."""
    earlier = [
        piece.tokens
        for piece in said.before
        if not {token.word for token in piece.tokens if not token.is_mark} <= INTERJECTIONS
    ]
    if earlier and (said.about == 0 or any(_says_otherwise(said, piece) for piece in earlier)):
        return True
    others = [token for piece in earlier for token in piece if token.is_name or token.is_number]
    if others and not any(restates(piece, said.key.question) for piece in earlier) and said.about < _RESTATED:
        return True
    beside = [token for token in said.tokens if token.is_content and not said.key.is_known(token)]
    return len(beside) > _MANY_WORDS and said.about < _HALF


def _other_time(said: Statement) -> bool:
    """`on the last day, which is usually the 15th`: to a question for a time, another one in the same sentence."""
    if not any(token.word == "when" for token in said.key.question):
        return False
    rest = [token for piece in said.after if piece.sentence == said.piece.sentence for token in (*piece.tokens, _END)]
    return any(
        token.is_number and not (following.is_content or said.key.is_known(token))
        for token, following in pairwise(rest)
    )


def _bare_list(said: Statement) -> bool:
    """One value a line."""
    pieces = [piece.tokens for piece in (*said.before, said.piece, *said.after)]
    length = max(2, sum(len(part.stems) for part in said.key.parts))
    return len(pieces) > 1 and all(sum(not token.is_mark for token in piece) <= length for piece in pieces)


def _of_another(said: Statement) -> bool:
    """`Clara works as a baker` to a question about Felix."""
    asked = {token.stem for token in said.key.question if token.is_name and token.word not in ENGLISH}
    tokens = said.tokens
    if not asked or any(token.stem in asked for token in tokens):
        return False
    behind = [token for token in tokens[said.last + 1 : said.last + 4] if token.word != "the"]
    if len(behind) > 1 and behind[0].word == "of" and behind[1].is_name and not said.key.is_known(behind[1]):
        return True
    for place, token in enumerate(tokens[: said.first]):
        # The first word has a capital whatever it is.
        is_name = token.is_name and (place > 0 or tokens[1].is_name or is_verb(tokens[1]))
        if is_name and not (said.key.is_known(token) or _is_of_a_people(token) or token.word in TITLES):
            return True
    return False


def _roles_swapped(said: Statement) -> bool:
    """`Ben gave it to Anna` for `Anna gave it to Ben`: the same words, other names first."""
    expected = [token for token in said.key.expected if not token.is_mark]
    tokens = [token for token in said.tokens if not token.is_mark]
    if sorted(token.stem for token in expected) != sorted(token.stem for token in tokens):
        return False
    names = {token.stem for token in expected if token.is_name}
    return [t.stem for t in expected if t.stem in names] != [t.stem for t in tokens if t.stem in names]


DOUBTS: dict[str, Callable[[Statement], bool]] = {
    "denied": _denied,
    "unsure": _unsure,
    "compared": _compared,
    "among others": _among_others,
    "from … to": _from_to,
    "part of a longer name": _longer_name,
    "part of a longer number": _longer_number,
    "another amount beside it": _other_amount,
    "another time beside it": _other_time,
    "taken back": _taken_back,
    "late": _comes_late,
    "bare list": _bare_list,
    "of another": _of_another,
    "names in other places": _roles_swapped,
}
"""Each a rule by itself; one that holds makes the answer wrong."""


def doubts(answer: str, key: Key) -> list[str]:
    """The names of what speaks against an answer, for people; `not said` if it does not have the key."""
    found = _find(_pieces(answer), key)
    return ["not said"] if found is None else [name for name, doubt in DOUBTS.items() if doubt(found)]
