"""Whether a question names a subject, told from tokens alone: no training, and the same for every encoder.

Addresses of whole questions are near to whatever they mention; they do not tell "Paris" from "Paris Hilton", nor say that
nobody of that name is known. The words do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

# The words stand together; they are a part of a longer name; they stand apart.
_WHOLE, _PART_OF_A_NAME, _SCATTERED = 1.0, 0.75, 0.85
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


@dataclass(frozen=True)
class Question:
    """A question as token ids. `spellings`: as it was typed, and in the cases that names are written in."""

    text: str
    spellings: tuple[Tokens, ...]

    @property
    def tokens(self) -> list[int]:
        """Every token of every spelling once."""
        return sorted({token for spelling in self.spellings for token in spelling.tolist()})


ACCEPTED = 0.84
"""A question is about an entry from so much on; below, the entry is not shown."""


class Vocabulary:
    """What is known of each token: how rare it is, and whether it goes on with a word or begins a name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        # Byte pair encoding numbers tokens by how common they are.
        self.rarity: Floats = np.log1p(np.arange(size) / 100).astype(np.float32) + 1e-3
        self._continues, self._is_name = np.zeros(size + 1, bool), np.zeros(size + 1, bool)
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
            self._continues[number] = not starts and bare[:1].isalnum()
            self._is_name[number] = starts and bare[:1].isupper()

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
        spellings = (text, text.title(), text.upper()) if text.islower() else (text,)
        return Question(text, tuple(np.array(ids, np.int32) for ids in self.tokens_of(spellings)))

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts as they stand within a sentence, after a space."""
        spaced = [f" {' '.join(text.split())}".rstrip() for text in texts]
        return [one.ids for one in self._tokenizer.encode_batch(spaced, add_special_tokens=False)]

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
        share = np.where(asked[tokens], weights, 0).sum(axis=1) / total
        surety = _SCATTERED * share
        for spelling in question.spellings:
            if len(spelling):
                surety = np.maximum(surety, self._standing(spelling, tokens, counts))
        explained = np.minimum(total / max(float(self.rarity[question.spellings[0]].sum()), 1e-6), 1)
        surety = surety * (1 - _EXPLAINS + _EXPLAINS * explained)
        for line in np.flatnonzero(ends[:, 0] == ends[:, 1]).tolist():
            surety[line] = self._told_by(question, tokens[line, : ends[line, 0]])
        return np.where(counts.any(axis=1), surety, 0).astype(np.float32)

    def _told_by(self, question: Question, sentence: Tokens) -> float:
        """How surely a sentence answers: by the share of the question's rare words in it, the best spelling's."""
        best = 0.0
        for spelling in question.spellings:
            weights = np.maximum(self.rarity[spelling] - _ORDINARY * self.rarity[-1], 0)
            stands = np.isin(spelling, sentence)
            if weights.sum() > 0 and not (self._is_name[spelling[1:]] & ~stands[1:]).any():
                best = max(best, float((weights * stands).sum() / weights.sum()))
        return _ALL_ELSE + (1 - _ALL_ELSE) * best if best else 0.0

    def _standing(self, spelling: Tokens, tokens: Tokens, counts: npt.NDArray[np.bool_]) -> Floats:
        """How each subject stands in one spelling, token for token: [m]."""
        length = tokens.shape[1]
        padded = np.concatenate([spelling, np.full(length + 1, _NOTHING, np.int32)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, length)[: len(spelling)]
        starts = windows[None, :, 0] == tokens[:, None, 0]
        lines, places = np.nonzero(starts)
        result = np.zeros(len(tokens), np.float32)
        stands = ((windows[places] == tokens[lines]) | ~counts[lines]).all(axis=1)
        lines, places = lines[stands], places[stands]
        behind = padded[places + counts[lines].sum(axis=1)]
        before = np.where(
            places > 1, spelling[places - 1], _NOTHING
        )  # the first word of a sentence is always a capital
        is_part = self._is_name[behind] | self._is_name[before]
        surety = np.where(self._continues[behind], 0, np.where(is_part, _PART_OF_A_NAME, _WHOLE))
        np.maximum.at(result, lines, surety.astype(np.float32))
        return result
