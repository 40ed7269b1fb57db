"""The encoder that needs no download: the base's own token embeddings, with two heads that training may improve.

Untrained, what a question is about is told by its words (`names.py`), and what it asks by how near its words are to those of a
relation; the address is only the way to candidates. Trained heads tell relations by their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from nightschool.memory.encoders.embeddings import TokenEmbeddings
from nightschool.memory.encoders.heads import Head, Heads, normalised, token_priors
from nightschool.memory.encoders.names import Question, Vocabulary
from nightschool.memory.index.rescoring import Lines

Floats = npt.NDArray[np.float32]

MOST_HALF = 768
# Texts that are pooled at a time, and rows of the table that its mean is summed over at a time.
_TEXTS, _ROWS = 512, 8192


class BaseEncoder:
    """Addresses from the token embeddings of a base. `keeps_keys`: the index need not keep them; tokens are enough."""

    keeps_keys = False

    def __init__(self, embeddings: TokenEmbeddings, vocabulary: Vocabulary, heads: Heads | None = None) -> None:
        half = min(embeddings.hidden_size, MOST_HALF)
        self.heads = heads or Heads.untrained(embeddings.hidden_size, half)
        self._embeddings, self._vocabulary = embeddings, vocabulary
        self._priors = token_priors(embeddings.vocab_size)
        projection = self.heads.subject.projection
        self.knowledge_dim = 2 * (embeddings.hidden_size if projection is None else len(projection))

    @property
    def is_trained(self) -> bool:
        """Whether the subject's cosine can be believed without the words."""
        return self.heads.trained

    @cached_property
    def identity(self) -> str:
        """Changes with whatever would give other addresses."""
        digest = sha256(self._mean.tobytes())
        for head in (self.heads.subject, self.heads.relation):
            digest.update(head.attention.tobytes())
            if head.projection is not None:
                digest.update(head.projection.tobytes())
        return f"base:{self.knowledge_dim}:{digest.hexdigest()[:16]}"

    def encode_addresses(self, subjects: Sequence[str], relations: Sequence[str]) -> tuple[Floats, Floats]:
        """Unit vectors of subjects and relations, [n, half] each."""
        return self._encode(self.heads.subject, subjects), self._encode(self.heads.relation, relations)

    def encode_queries(self, texts: Sequence[str]) -> tuple[Floats, Floats]:
        """Unit vectors of what questions are about and of what they ask, [b, half] each."""
        subjects = self._encode(self.heads.subject, texts)
        return subjects, subjects if not self.heads.trained else self._encode(self.heads.relation, texts)

    def cosines(
        self, lines: Lines, questions: Sequence[Question], subjects: Floats, relations: Floats
    ) -> tuple[Floats, Floats]:
        """How near finalists are to the questions they were found for, [m] and [m]: see `Rescorer`.

        Untrained, the first is 0: the words tell it. The second then says how well the words of a relation are found in the
        question: the mean over its tokens of the cosine to the nearest token there.
        """
        begins, ends = lines.spans[:, 0].astype(np.int64), lines.spans[:, 1].astype(np.int64)
        of_relations = _shifted(lines.tokens, begins)
        lengths = np.maximum(ends - begins, 0)
        if self.heads.trained:
            e1 = self._pooled(self.heads.subject, lines.tokens, begins)
            e2 = self._pooled(self.heads.relation, of_relations, lengths)
            return (
                np.einsum("md,md->m", e1, subjects[lines.queries]),
                np.einsum("md,md->m", e2, relations[lines.queries]),
            )
        found = np.zeros(len(lines.queries), np.float32)
        for question in np.unique(lines.queries).tolist():
            mine = np.flatnonzero(lines.queries == question)
            asked = questions[question].spellings[0].tokens
            if len(asked):
                found[mine] = self._nearness(asked, of_relations[mine], lengths[mine])
        return np.zeros_like(found), found

    def _nearness(
        self, asked: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.integer]
    ) -> Floats:
        counts = np.arange(tokens.shape[1]) < lengths[:, None]
        distinct, places = np.unique(np.where(counts, tokens, 0), return_inverse=True)
        nearest = np.clip((self._unit(distinct) @ self._unit(asked).T).max(axis=1), 0, 1)
        # Another form of a word that stands in the question is as good as the word: "live" and "lives in".
        stems = self._vocabulary.stems
        nearest = np.where(np.isin(stems[distinct], stems[asked]), 1.0, nearest)
        weights = np.where(counts, self._vocabulary.rarity[tokens], 0)
        total = (weights * nearest[places.reshape(tokens.shape)]).sum(axis=1)
        mean: Floats = total / np.maximum(weights.sum(axis=1), 1e-6)
        return mean

    def _encode(self, head: Head, texts: Sequence[str]) -> Floats:
        encoded = self._vocabulary.tokens_of(texts)
        pooled = [np.empty((0, self.knowledge_dim // 2), np.float32)]
        for begin in range(0, len(encoded), _TEXTS):
            part = encoded[begin : begin + _TEXTS]
            lengths = np.array([len(one) for one in part])
            tokens = np.zeros((len(part), max(int(lengths.max()), 1)), np.int32)
            for line, one in zip(tokens, part, strict=True):
                line[: len(one)] = one
            pooled.append(self._pooled(head, tokens, lengths))
        return np.concatenate(pooled)

    def _pooled(self, head: Head, tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.integer]) -> Floats:
        return head.pooled(self.features(tokens), self._priors[tokens], lengths)

    def features(self, tokens: npt.NDArray[np.integer]) -> Floats:
        """`h_t` of token ids [...] → [..., H]: embeddings without their mean, as unit vectors."""
        return normalised(self._embeddings.rows(tokens) - self._mean)

    def _unit(self, tokens: npt.NDArray[np.integer]) -> Floats:
        return normalised(self._embeddings.rows(tokens))

    @cached_property
    def _mean(self) -> Floats:
        table = self._embeddings
        total = np.zeros(table.hidden_size)
        for begin in range(0, table.vocab_size, _ROWS):
            total += table.rows(np.arange(begin, min(begin + _ROWS, table.vocab_size))).sum(axis=0, dtype=np.float64)
        return (total / table.vocab_size).astype(np.float32)


def _shifted(tokens: npt.NDArray[np.int32], begins: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """Each line [n, L] from its place `begins` [n] on; what is behind the end repeats the last token."""
    places = np.minimum(np.arange(tokens.shape[1]) + begins[:, None], tokens.shape[1] - 1)
    return np.take_along_axis(tokens, places, axis=1)
