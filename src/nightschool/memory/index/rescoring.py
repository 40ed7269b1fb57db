"""The last word on a few finalists: how near each really is to a question, from what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Lines:
    """Finalists of several questions, one after the other.

    `queries` [m] says of which question each is, ascending; `rows` [m] its number in the store; `tokens` [m, L]; `spans` [m, 2]
    where its subject and its relation end among the tokens; `keys` [m, 2·half] its address, where the index keeps it.
    """

    queries: Numbers
    rows: Numbers
    tokens: npt.NDArray[np.int32]
    spans: npt.NDArray[np.integer]
    keys: Floats | None


class Rescorer(Protocol):
    """Scores finalists.

    `certain`: a question with a subject cosine of so much needs no other way of finding. `relation_weight`: what the cosine of
    relations counts, where that of subjects counts 1.
    """

    certain: float
    relation_weight: float

    def __call__(self, lines: Lines) -> tuple[Floats, Floats]:
        """The cosines of subject and relation of each finalist, [m] and [m]."""


class KeptKeys:
    """Scores by the addresses that the index keeps in half precision: for encoders that are slow, or read text alone."""

    relation_weight = 1.0

    def __init__(self, subjects: Floats, relations: Floats, *, certain: float = 0.9) -> None:
        """`subjects` and `relations`: of the questions, [b, half] each."""
        self._queries = (subjects, relations)
        self.certain = certain

    def __call__(self, lines: Lines) -> tuple[Floats, Floats]:
        """See `Rescorer`."""
        if lines.keys is None:
            raise ValueError("this index keeps no addresses: search with a rescorer that computes them from tokens")
        half = lines.keys.shape[1] // 2
        subjects, relations = self._queries
        return (
            np.einsum("md,md->m", subjects[lines.queries], lines.keys[:, :half]),
            np.einsum("md,md->m", relations[lines.queries], lines.keys[:, half:]),
        )
