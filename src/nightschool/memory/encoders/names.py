"""Whether a question names a subject, told from its words alone: no training, and the same for every encoder.

Addresses of whole questions are near to whatever they mention; they do not tell "Paris" from "Paris Hilton", nor say that
nobody of that name is known. The words do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from nightschool.memory.encoders.phrases import Standing, standing

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

# How surely a name is meant that stands in the question as a whole or as a part, or whose words stand apart.
_SURETIES = {Standing.WHOLE: 1.0, Standing.PART_OF_A_NAME: 0.75, Standing.PART_OF_A_WORD: 0.0}
_SCATTERED = 0.85
# Of a name that stands in a text more often, the first ones are looked at.
_MOST_PLACES = 16
# Of two subjects that are both named, the one that explains more of the question wins by so much.
_EXPLAINS = 0.03
# Words that are less than this as rare as the rarest tell nothing. A sentence with half of the others is accepted, one with fewer is not.
_ORDINARY, _ALL_ELSE = 0.4, 0.68
# What English words take on; a stem is no shorter than this.
_ENDINGS = ("ing", "ed", "es", "s", "e")
_LEAST_STEM = 3
_WORD_STARTS = ("Ġ", "▁")
_PIECE = "##"
_NOTHING = -1
_FIRST_LETTERS = re.compile(r"(?<![\w'’])[^\W\d_]")


@dataclass(frozen=True)
class Spelling:
    """A text and its tokens, with the characters that each stands for. `has_capitals`: they are those of its author."""

    text: str
    tokens: Tokens
    places: tuple[tuple[int, int], ...]
    has_capitals: bool


@dataclass(frozen=True)
class Question:
    """A question as token ids. `spellings`: as it was typed, and in the cases that names are written in."""

    text: str
    spellings: tuple[Spelling, ...]

    @property
    def tokens(self) -> list[int]:
        """Every token of every spelling once."""
        return sorted({token for spelling in self.spellings for token in spelling.tokens.tolist()})


ACCEPTED = 0.84
"""A question is about an entry from so much on; below, the entry is not shown."""


class Vocabulary:
    """What is known of each token: how rare it is, and whether it goes on with a word or begins a name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        # Byte pair encoding numbers tokens by how common they are.
        self.rarity: Floats = np.log1p(np.arange(size) / 100).astype(np.float32) + 1e-3
        # Whether a token begins a name; and whether it is letters or digits that go on with a word, or begin one.
        self._is_name, self._continues, self._is_word = (np.zeros(size + 1, bool) for _ in range(3))
        self._stem_numbers: dict[str, int] = {}
        # Tokens of one word in another form (live, lives, lived) have the same number; those of other words their own.
        self.stems: Tokens = np.arange(-size, 0, dtype=np.int32)
        pieces = tokenizer.get_vocab(with_added_tokens=False)
        marks_starts = any(piece.startswith(_WORD_STARTS) for piece in pieces)
        for piece, number in pieces.items():
            if marks_starts:
                bare, starts = piece.lstrip("".join(_WORD_STARTS)), piece.startswith(_WORD_STARTS)
            else:
                bare, starts = piece.removeprefix(_PIECE), not piece.startswith(_PIECE)
            self._note_stem(bare, number)
            self._is_name[number] = starts and bare[:1].isupper()
            self._is_word[number] = starts or bare[:1].isalnum()
            self._continues[number] = not starts and bare[:1].isalnum()

    @cached_property
    def digest(self) -> str:
        """What tells this tokenizer from another."""
        return sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def _note_stem(self, bare: str, number: int) -> None:
        stem = bare.lower()
        ending = next((one for one in _ENDINGS if stem.endswith(one) and len(stem) - len(one) >= _LEAST_STEM), "")
        stem = stem.removesuffix(ending)
        if len(stem) >= _LEAST_STEM and stem.isalpha():
            self.stems[number] = self._stem_numbers.setdefault(stem, len(self._stem_numbers))

    @property
    def size(self) -> int:
        return len(self.rarity)

    def question(self, text: str) -> Question:
        """Tokens of a question. Names in another case than theirs are other tokens, so a few spellings are tried."""
        if not (text.islower() or text.isupper()):
            return Question(text, (self._spelling(text, has_capitals=True),))
        lower = text.lower()
        typed = (lower, _FIRST_LETTERS.sub(lambda found: found[0].upper(), lower), text.upper())
        return Question(text, tuple(self._spelling(one, has_capitals=False) for one in typed))

    def _spelling(self, text: str, *, has_capitals: bool) -> Spelling:
        spaced = _spaced(text)
        encoded = self._tokenizer.encode(spaced, add_special_tokens=False)
        places = tuple((end - len(spaced[start:end].lstrip()), end) for start, end in encoded.offsets)
        return Spelling(spaced, np.array(encoded.ids, np.int32), places, has_capitals)

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts as they stand within a sentence, after a space."""
        spaced = [_spaced(text) for text in texts]
        return [one.ids for one in self._tokenizer.encode_batch(spaced, add_special_tokens=False)]

    def is_usually_capital(self, word: str) -> bool:
        """Whether a word with a capital is rarer, or in more pieces, without it. Of words that are no names it is not."""
        as_is, lower = self.tokens_of([word, word.lower()])
        return float(self.rarity[as_is].sum()) < float(self.rarity[lower].sum())

    def named(self, question: Question, tokens: Tokens, spans: npt.NDArray[np.integer]) -> Floats:
        """How surely a question is about each entry, [m].

        Args:
            question: The question.
            tokens: Of each entry, its subject's first. [m, L]
            spans: How many of them are its subject's, and how many its subject's and its relation's. Where these are the same, it
                is a sentence whose subject could not be told. [m, 2]

        Returns:
            1 where the subject stands in the question whole, less where in parts or within a longer name, 0 where it is not
            named. Of a sentence: from the share of the question's rare words that stand in it.
        """
        length = tokens.shape[1]
        ends = np.minimum(spans, length).astype(np.int64)
        counts = np.arange(length) < ends[:, :1]
        weights = np.where(counts, self.rarity[tokens], 0)
        total = np.maximum(weights.sum(axis=1), 1e-6)
        asked = np.zeros(self.size, bool)
        asked[question.tokens] = True
        surety = _SCATTERED * np.where(asked[tokens], weights, 0).sum(axis=1) / total
        self._forget_split_words(question, tokens, counts, surety)
        for line, found in self._standing(question, tokens, ends, counts).items():
            surety[line] = found
        explained = np.minimum(total / max(float(self.rarity[question.spellings[0].tokens].sum()), 1e-6), 1)
        surety = surety * (1 - _EXPLAINS + _EXPLAINS * explained)
        for line in np.flatnonzero(ends[:, 0] == ends[:, 1]).tolist():
            surety[line] = self._told_by(question, tokens[line, : ends[line, 0]])
        return np.where(counts.any(axis=1), surety, 0).astype(np.float32)

    def _told_by(self, question: Question, sentence: Tokens) -> float:
        """How surely a sentence answers: by the share of the question's rare words in it, the best spelling's."""
        best = 0.0
        for spelling in (one.tokens for one in question.spellings):
            weights = np.maximum(self.rarity[spelling] - _ORDINARY * self.rarity[-1], 0)
            stands = np.isin(spelling, sentence)
            if weights.sum() > 0 and not (self._is_name[spelling[1:]] & ~stands[1:]).any():
                best = max(best, float((weights * stands).sum() / weights.sum()))
        return _ALL_ELSE + (1 - _ALL_ELSE) * best if best else 0.0

    def _forget_split_words(
        self, question: Question, tokens: Tokens, counts: npt.NDArray[np.bool_], surety: Floats
    ) -> None:
        """No surety of a subject all of whose tokens stand in the question, but not all of its words: of "GT1" in "911 GT2" for 1."""
        asked = [Counter(self._words(spelling.tokens)) for spelling in question.spellings]
        for line in np.flatnonzero(surety >= ACCEPTED * (1 - _EXPLAINS)).tolist():
            named = Counter(self._words(tokens[line, counts[line]]))
            if not any(named <= words for words in asked):
                surety[line] = 0

    def _words(self, tokens: Tokens) -> list[tuple[int, ...]]:
        """The tokens of each word; signs are none."""
        starts = np.flatnonzero(~self._continues[tokens])
        words = (tuple(one.tolist()) for one in np.split(tokens, starts) if len(one))
        return [word for word in words if self._is_word[word[0]]]

    def _standing(
        self, question: Question, tokens: Tokens, ends: npt.NDArray[np.int64], counts: npt.NDArray[np.bool_]
    ) -> dict[int, float]:
        """How surely those subjects are meant that stand in a spelling token for token, where the words beside them tell."""
        found: dict[int, float] = {}
        length = tokens.shape[1]
        for spelling in question.spellings:
            padded = np.concatenate([spelling.tokens, np.full(length, _NOTHING, np.int32)])
            windows = np.lib.stride_tricks.sliding_window_view(padded, length)[: len(spelling.tokens)]
            lines, places = np.nonzero(windows[None, :, 0] == tokens[:, None, 0])
            stands = ((windows[places] == tokens[lines]) | ~counts[lines]).all(axis=1)
            looked_at: Counter[int] = Counter()
            for line, place in zip(lines[stands].tolist(), places[stands].tolist(), strict=True):
                first, last = place, place + int(ends[line, 0]) - 1
                looked_at[line] += 1
                if last < first or looked_at[line] > _MOST_PLACES or found.get(line) == _SURETIES[Standing.WHOLE]:
                    continue
                relation = set(self.stems[tokens[line, ends[line, 0] : ends[line, 1]]].tolist())
                how = standing(
                    spelling.text,
                    spelling.places[first][0],
                    spelling.places[last][1],
                    has_capitals=spelling.has_capitals,
                    writing=self.is_usually_capital,
                    explained=partial(self._is_told, spelling, relation),
                )
                if how in _SURETIES:
                    found[line] = max(found.get(line, 0.0), _SURETIES[how])
        return found

    def _is_told(self, spelling: Spelling, relation: set[int], start: int, end: int) -> bool:
        """Whether what stands at some characters of a spelling is a form of words of a relation."""
        inside = [place for place, (begin, stop) in enumerate(spelling.places) if begin < end and stop > start]
        return set(self.stems[spelling.tokens[inside]].tolist()) <= relation


def _spaced(text: str) -> str:
    """A text as it stands within a sentence, after a space."""
    return f" {' '.join(text.split())}".rstrip()
