"""What turns texts into addresses, and what is common to encoders that read text alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nightschool.memory.encoders.names import Question
from nightschool.memory.index.rescoring import KeptKeys, Lines

Floats = npt.NDArray[np.float32]


class AddressEncoder(Protocol):
    """Addresses of entries and of questions: two unit vectors of `knowledge_dim` / 2 numbers each.

    `identity` changes with whatever would give other addresses. `keeps_keys`: the index has to keep addresses, because tokens
    are not enough to compute them again. `is_trained`: the cosine of subjects can be believed without a look at the words.
    """

    @property
    def identity(self) -> str: ...

    @property
    def knowledge_dim(self) -> int: ...

    @property
    def keeps_keys(self) -> bool: ...

    @property
    def is_trained(self) -> bool: ...

    def encode_addresses(self, subjects: Sequence[str], relations: Sequence[str]) -> tuple[Floats, Floats]:
        """Of entries: [n, half] and [n, half]."""

    def encode_queries(self, texts: Sequence[str]) -> tuple[Floats, Floats]:
        """Of questions: [b, half] and [b, half]."""

    def cosines(
        self, lines: Lines, questions: Sequence[Question], subjects: Floats, relations: Floats
    ) -> tuple[Floats, Floats]:
        """How near finalists are to the questions that they were found for: see `Rescorer`."""


class TextEncoder(ABC):
    """An encoder of whole texts, the same for subjects, relations and questions: a subclass says how."""

    keeps_keys = True
    is_trained = False

    def __init__(self, identity: str, width: int) -> None:
        self.identity, self.knowledge_dim = identity, 2 * width

    def encode_addresses(self, subjects: Sequence[str], relations: Sequence[str]) -> tuple[Floats, Floats]:
        """See `AddressEncoder`. Texts that come again are encoded once."""
        return self._each_once(subjects), self._each_once(relations)

    def encode_queries(self, texts: Sequence[str]) -> tuple[Floats, Floats]:
        """See `AddressEncoder`."""
        vectors = self._each_once(texts)
        return vectors, vectors

    def cosines(
        self,
        lines: Lines,
        questions: Sequence[Question],  # noqa: ARG002  words say nothing here
        subjects: Floats,
        relations: Floats,
    ) -> tuple[Floats, Floats]:
        """See `AddressEncoder`: from the addresses that the index keeps."""
        return KeptKeys(subjects, relations)(lines)

    @abstractmethod
    def embed(self, texts: list[str]) -> Floats:
        """Unit vectors of texts, [n, half]."""

    def _each_once(self, texts: Sequence[str]) -> Floats:
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        if not distinct:
            return np.empty((0, self.knowledge_dim // 2), np.float32)
        return self.embed(list(distinct))[[distinct[text] for text in texts]]
