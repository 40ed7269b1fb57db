"""Which entries lie in which cell, and which cells a query looks into.

Cells are addresses, not places for one entry: some hold none, others many. The lists are sorted by cell and followed by a
short tail of what came since; when the tail, or what has ended in the lists, is long, both are merged.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

TAIL = 8192
_FIRST_LOOK = 24


class CellLists:
    """Slots by cell. `order` are slots sorted by their cell, `starts` [cells + 1] where each cell begins in it."""

    def __init__(self, size: int, order: Slots, starts: Slots) -> None:
        self.size, self.order, self.starts = size, order, starts
        self._tail = np.empty(TAIL, np.int32)
        self._tail_cells = np.empty(TAIL, np.int32)
        self._tail_length = 0
        self.ended = 0
        self._columns = self._occupied_columns()

    @classmethod
    def of(cls, size: int, slots: Slots, cells: Slots) -> CellLists:
        """Lists of slots [n] that lie in `cells` [n]."""
        by_cell = np.argsort(cells, kind="stable")
        counts = np.bincount(cells, minlength=size * size)
        starts = np.zeros(size * size + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        return cls(size, slots[by_cell].astype(np.int32), starts)

    @property
    def needs_merge(self) -> bool:
        """Whether the tail is full, or so much has ended in the lists that searching suffers."""
        return self._tail_length == TAIL or self.ended >= TAIL

    def append(self, slot: int, cell: int) -> None:
        """Put a slot into a cell. The caller merges first when `needs_merge`."""
        self._tail[self._tail_length] = slot
        self._tail_cells[self._tail_length] = cell
        self._tail_length += 1

    def merged(self, cells_of_slots: Slots, is_live: Flags) -> CellLists:
        """New lists with the tail in its places and without what has ended. Both arguments are by slot."""
        kept = self.order[is_live[self.order]]
        tail = self._tail[: self._tail_length]
        tail = tail[is_live[tail]]
        tail = tail[np.argsort(cells_of_slots[tail], kind="stable")]
        kept_cells, tail_cells = cells_of_slots[kept], cells_of_slots[tail]
        order = np.insert(kept, np.searchsorted(kept_cells, tail_cells, side="right"), tail)
        counts = np.bincount(kept_cells, minlength=self.size**2) + np.bincount(tail_cells, minlength=self.size**2)
        starts = np.zeros(self.size**2 + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        return CellLists(self.size, order, starts)

    def nearest(self, subject_scores: Floats, relation_scores: Floats, wanted: int) -> Slots:
        """At least `wanted` slots of the highest quantised score, or all; some may have ended.

        The score of a cell is the sum of its row's and its column's. Rows and columns are looked at from the best down, until no
        cell that was not looked at can beat the last one taken (the threshold algorithm of Fagin et al. 2001): what comes back
        are exactly the best cells, however many of them are empty.

        Args:
            subject_scores: Of the centroids of subjects, [size].
            relation_scores: Of the centroids of relations, [size].
            wanted: How many slots at least.
        """
        taken, bound = self._best_cells(subject_scores, relation_scores, wanted)
        tail = self._tail[: self._tail_length]
        if not len(tail):
            return taken
        rows, columns = np.divmod(self._tail_cells[: self._tail_length], self.size)
        scores = subject_scores[rows] + relation_scores[columns]
        return np.concatenate([taken, tail[scores >= bound]])

    def _best_cells(self, subject_scores: Floats, relation_scores: Floats, wanted: int) -> tuple[Slots, float]:
        width, columns = _FIRST_LOOK, self._columns
        column_scores = relation_scores[columns]
        row_order, column_order = np.argsort(-subject_scores), np.argsort(-column_scores)
        while True:
            rows, picked = row_order[:width], column_order[: 2 * width]
            of_rows, of_columns = subject_scores[rows], column_scores[picked]
            cells = (rows[:, None] * self.size + columns[picked][None, :]).ravel()
            scores = (of_rows[:, None] + of_columns[None, :]).ravel()
            counts = self.starts[cells + 1] - self.starts[cells]
            filled = np.flatnonzero(counts)
            best = filled[np.argsort(-scores[filled])]
            held = np.cumsum(counts[best])
            last = int(np.searchsorted(held, wanted))
            unseen = -np.inf
            if width < self.size:
                unseen = subject_scores[row_order[width]] + column_scores[column_order[0]] if len(columns) else -np.inf
            if 2 * width < len(columns):
                unseen = max(unseen, of_rows[0] + column_scores[column_order[2 * width]])
            if unseen == -np.inf or (last < len(best) and scores[best[last]] >= unseen):
                break
            width *= 2
        best = best[: last + 1]
        bound = float(scores[best[-1]]) if last < len(held) else -np.inf
        return self._slots_of(cells[best], counts[best]), bound

    def _slots_of(self, cells: npt.NDArray[np.int64], counts: Slots) -> Slots:
        if not len(cells):
            return np.empty(0, np.int32)
        ends = np.cumsum(counts)
        shift = np.repeat(self.starts[cells] - (ends - counts), counts)
        slots: Slots = self.order[shift + np.arange(ends[-1])]
        return slots

    def _occupied_columns(self) -> npt.NDArray[np.int64]:
        """Centroids of relations with an entry in the lists: there are few relations."""
        counts = np.diff(self.starts).reshape(self.size, self.size)
        return np.flatnonzero(counts.any(axis=0))
