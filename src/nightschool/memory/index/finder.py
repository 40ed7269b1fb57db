"""The ways to the entries of a question. The next one is gone only where the one before found no certain subject."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nightschool.memory.index.cells import CellLists
from nightschool.memory.index.columns import Columns
from nightschool.memory.index.hamming import nearest
from nightschool.memory.index.postings import Postings
from nightschool.memory.index.quantiser import Quantiser
from nightschool.memory.index.ranking import Hits, Ranking
from nightschool.memory.index.rescoring import Rescorer

Floats = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int32]

# Cells are looked into until so many entries are found; so many of them, by their codes, are scored exactly.
CANDIDATES, FINALISTS = 512, 32
# What the bits find is ranked by codes; far more of them are needed, for they are coarse.
_BY_BITS = 4096
_NONE = np.empty(0, np.int32)


class Finder:
    """Looks for entries as a revision has them; None is the newest."""

    def __init__(
        self, quantiser: Quantiser, columns: Columns, cells: CellLists, postings: Postings, revision: int | None
    ) -> None:
        self._quantiser, self._columns, self._cells, self._postings = quantiser, columns, cells, postings
        self._revision = revision

    def search(
        self,
        subjects: Floats,
        relations: Floats,
        query_tokens: Sequence[Sequence[int]] | None,
        k: int,
        rescorer: Rescorer,
        candidates: int,
    ) -> Hits:
        """See `MemoryIndex.search`."""
        ranking = Ranking(self._columns, rescorer, len(subjects))
        quantiser, finalists = self._quantiser, max(FINALISTS, k)
        code_queries = quantiser.code_queries(subjects, relations)
        by_subject = subjects @ quantiser.codebooks[0].T
        by_relation = relations @ quantiser.codebooks[1].T
        ranking.add(
            [
                self._by_codes(self._by_cells(one, other, candidates), code_query, finalists)
                for one, other, code_query in zip(by_subject, by_relation, code_queries, strict=True)
            ]
        )
        if query_tokens is not None and (unsure := ranking.uncertain()):
            found = {one: self._by_names(query_tokens[one], 2 * finalists) for one in unsure}
            ranking.add([found.get(question, _NONE) for question in range(len(subjects))])
        if unsure := ranking.uncertain():
            bits = quantiser.hashes(subjects[unsure], relations[unsure])
            found = {
                one: self._by_codes(self._by_bits(bits[:, place]), code_queries[one], finalists)
                for place, one in enumerate(unsure)
            }
            ranking.add([found.get(question, _NONE) for question in range(len(subjects))])
        return ranking.hits(k)

    def _by_cells(self, by_subject: Floats, by_relation: Floats, wanted: int) -> Slots:
        columns, want = self._columns, wanted
        while True:
            slots = self._cells.nearest(by_subject, by_relation, want)
            seen = slots[columns.is_visible(slots, self._revision)]
            if len(seen) >= wanted or len(slots) < want:
                break
            want *= 4
        if self._revision is None:
            return seen
        # Those that have ended since stand in no list.
        ended = np.flatnonzero(columns.died[: columns.length] > self._revision).astype(np.int32)
        ended = ended[columns.is_visible(ended, self._revision)]
        rows, cells = np.divmod(columns.cells[ended], self._quantiser.size)
        scores = by_subject[rows] + by_relation[cells]
        return np.union1d(seen, ended[np.argpartition(-scores, wanted)[:wanted]] if len(ended) > wanted else ended)

    def _by_names(self, tokens: Sequence[int], wanted: int) -> Slots:
        want = wanted
        while True:
            slots = self._postings.best(tokens, self._columns.length, want)
            seen = slots[self._columns.is_visible(slots, self._revision)]
            if len(seen) >= wanted or len(slots) < want:
                return seen
            want *= 4

    def _by_bits(self, bits: npt.NDArray[np.uint64]) -> Slots:
        slots = nearest(bits, self._columns.hashes[:, : self._columns.length], _BY_BITS)
        return slots[self._columns.is_visible(slots, self._revision)]

    def _by_codes(self, slots: Slots, code_query: Floats, wanted: int) -> Slots:
        if len(slots) <= wanted:
            return slots
        scores = self._columns.codes[slots].astype(np.float32) @ code_query
        return slots[np.argpartition(scores, -wanted)[-wanted:]]
