"""The finalists of a batch of questions: scored together, once each, and brought into order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nightschool.memory.index.columns import Columns
from nightschool.memory.index.rescoring import Lines, Rescorer

Floats = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Hits:
    """What was found for each question, best first: [b, k], with row 0 and -inf where nothing more was."""

    rows: npt.NDArray[np.int64]
    scores: Floats
    subject_cosines: Floats
    relation_cosines: Floats


class Ranking:
    """Collects the finalists of a batch of questions."""

    def __init__(self, columns: Columns, rescorer: Rescorer, num_questions: int) -> None:
        self._columns, self._rescorer = columns, rescorer
        self._slots: list[Slots] = [np.empty(0, np.int32)] * num_questions
        self._subjects: list[Floats] = [np.empty(0, np.float32)] * num_questions
        self._relations: list[Floats] = [np.empty(0, np.float32)] * num_questions

    def add(self, found: Iterable[Slots]) -> None:
        """Score what was found for each question, in their order, and is not known of it."""
        new = [
            slots if not len(known) else np.setdiff1d(slots, known)
            for slots, known in zip(found, self._slots, strict=True)
        ]
        counts = [len(slots) for slots in new]
        if not any(counts):
            return
        slots, columns = np.concatenate(new), self._columns
        keys = None if columns.keys is None else columns.keys[slots].astype(np.float32)
        subjects, relations = self._rescorer(
            Lines(
                np.repeat(np.arange(len(new)), counts),
                columns.rows[slots].astype(np.int64),
                columns.tokens[slots],
                columns.spans[slots],
                keys,
            )
        )
        begin = 0
        for question, count in enumerate(counts):
            if not count:
                continue
            part = slice(begin, begin + count)
            begin += count
            if not len(self._slots[question]):
                self._slots[question] = slots[part]
                self._subjects[question], self._relations[question] = subjects[part], relations[part]
                continue
            self._slots[question] = np.concatenate([self._slots[question], slots[part]])
            self._subjects[question] = np.concatenate([self._subjects[question], subjects[part]])
            self._relations[question] = np.concatenate([self._relations[question], relations[part]])

    def uncertain(self) -> list[int]:
        """The questions for which no certain subject was found so far."""
        bound = self._rescorer.certain
        return [place for place, cosines in enumerate(self._subjects) if not len(cosines) or cosines.max() < bound]

    def hits(self, k: int) -> Hits:
        """The `k` best of each question by the weighted sum of its two cosines; of equals the newer row first."""
        shape = (len(self._slots), k)
        rows = np.zeros(shape, np.int64)
        scores, of_subjects, of_relations = (np.full(shape, -np.inf, np.float32) for _ in range(3))
        for question, (slots, subjects, relations) in enumerate(
            zip(self._slots, self._subjects, self._relations, strict=True)
        ):
            total = subjects + self._rescorer.relation_weight * relations
            best = np.lexsort((-slots, -total))[:k]
            count = len(best)
            rows[question, :count] = self._columns.rows[slots[best]]
            scores[question, :count] = total[best]
            of_subjects[question, :count] = subjects[best]
            of_relations[question, :count] = relations[best]
        return Hits(rows, scores, of_subjects, of_relations)
