"""The memory index: which entries a question means, among a million, in a fraction of a millisecond.

An entry is addressed by what it is about, its subject and its relation, and never by its value, so that an edit of a value moves
nothing. A question takes three ways, the next one only where the one before found no certain subject: product-key cells, whose
finalists are ranked by codes and then scored exactly; the entries that name its rarest tokens; the bits of all entries.

Everything here is derived from the store's rows and can be rebuilt. Each row carries when it was born and when it died, so that
a reader who is pinned to a revision stays on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from nightschool.memory.index.cells import CellLists
from nightschool.memory.index.columns import Columns
from nightschool.memory.index.finder import CANDIDATES, Finder
from nightschool.memory.index.postings import Postings
from nightschool.memory.index.quantiser import Quantiser
from nightschool.memory.index.ranking import Hits
from nightschool.memory.index.rescoring import KeptKeys, Rescorer

Floats = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int32]

_CHUNK = 1 << 16
# From so many rows at once, or an eighth of all, it is quicker to make the lists anew.
_LEAST_BULK = 2048


class MemoryIndex:
    """Rows by address. Safe to use from several threads; one works at a time.

    `revision` is how far it has followed the store, `horizon` the oldest revision that can be asked for, `fitted_on` how many
    entries there were when its quantiser was fitted.
    """

    def __init__(
        self,
        quantiser: Quantiser,
        columns: Columns,
        cells: CellLists,
        postings: Postings,
        *,
        revision: int = 0,
        horizon: int = 0,
        fitted_on: int = 0,
    ) -> None:
        self.quantiser, self.columns, self.cells, self.postings = quantiser, columns, cells, postings
        self.revision, self.horizon, self.fitted_on = revision, horizon, fitted_on
        self._lock = threading.RLock()

    @classmethod
    def empty(cls, quantiser: Quantiser, tokens_per_line: int = 16, *, keeps_keys: bool = False) -> MemoryIndex:
        """An index without entries. `keeps_keys`: keep addresses in half precision, for rescorers that need them."""
        nothing = np.empty(0, np.int32)
        return cls(
            quantiser,
            Columns.empty(tokens_per_line, key_width=2 * quantiser.half if keeps_keys else 0),
            CellLists.of(quantiser.size, nothing, nothing),
            Postings.of(nothing, nothing.reshape(0, 1), nothing),
        )

    def __len__(self) -> int:
        """Entries that live."""
        return int((self.columns.died[: self.columns.length] == 0).sum())

    @property
    def tokens_per_line(self) -> int:
        return int(self.columns.tokens.shape[1])

    def add(
        self,
        rows: npt.ArrayLike,
        tokens: Slots,
        subjects: Floats,
        relations: Floats,
        revision: int | npt.NDArray[np.integer],
        *,
        spans: npt.NDArray[np.integer] | None = None,
        lengths: npt.NDArray[np.integer] | None = None,
        lists: bool = True,
    ) -> None:
        """Enter rows; the next search finds them.

        Args:
            rows: The store's numbers, ascending, higher than all before. [n]
            tokens: Of each entry, 0 behind its end. [n, L]
            subjects: Unit vectors of the subjects. [n, half]
            relations: Unit vectors of the relations. [n, half]
            revision: The one that made them, or one for each, [n].
            spans: Where subject and relation end among the tokens, [n, 2]; all tokens, if it is not told.
            lengths: The tokens of the whole entry, which may be more than L; L, if it is not told. [n]
            lists: False leaves the lists as they are, until `rebuild_lists`, for whoever adds many in parts.

        Raises:
            ValueError: If the rows do not ascend.
        """
        numbers = np.atleast_1d(np.asarray(rows, np.int64))
        count, width = len(numbers), self.tokens_per_line
        with self._lock:
            columns = self.columns
            newest = int(columns.rows[columns.length - 1]) if columns.length else 0
            if count and (numbers[0] <= newest or (np.diff(numbers) <= 0).any()):
                raise ValueError(f"rows must ascend from {newest + 1}; these begin at {numbers[0]}")
            columns.reserve(count)
            revisions = np.broadcast_to(np.asarray(revision, np.int64), count)
            for begin in range(0, count, _CHUNK):
                part = slice(begin, min(begin + _CHUNK, count))
                self._enter(
                    numbers[part],
                    tokens[part],
                    np.ascontiguousarray(subjects[part], np.float32),
                    np.ascontiguousarray(relations[part], np.float32),
                    np.full((part.stop - begin, 2), width) if spans is None else spans[part],
                    np.full(part.stop - begin, width) if lengths is None else lengths[part],
                    revisions[part],
                    lists=lists,
                )
            self.revision = max([self.revision, *revisions[-1:].tolist()])

    def replace(
        self,
        old_row: int,
        new_row: int,
        tokens: Slots,
        revision: int,
        *,
        length: int | None = None,
        spans: tuple[int, int] | None = None,
    ) -> None:
        """An edit of a value: `new_row` takes the address of `old_row`, which ends. Nothing is encoded.

        Raises:
            KeyError: If the index has no `old_row`.
        """
        with self._lock:
            old = self._slot(old_row)
            columns = self.columns
            columns.reserve(1)
            columns = self.columns
            new = columns.length
            columns.rows[new], columns.born[new], columns.died[new] = new_row, revision, 0
            columns.tokens[new] = tokens
            columns.lengths[new] = len(tokens) if length is None else length
            columns.spans[new] = columns.spans[old] if spans is None else spans
            columns.codes[new] = columns.codes[old]
            columns.hashes[:, new] = columns.hashes[:, old]
            if columns.keys is not None:
                columns.keys[new] = columns.keys[old]
            cell = columns.cells[new] = columns.cells[old]
            columns.length = new + 1
            self._end(old, revision)
            if self.cells.needs_merge:
                self._merge()
            self.cells.append(new, cell)
            self.postings.append(new, tokens[: columns.spans[new, 1]].tolist())
            self.revision = max(self.revision, revision)

    def end(self, row: int, revision: int) -> None:
        """A row is no more, from `revision` on; that of one that has ended before stays. Raises KeyError if the index has no such row."""
        with self._lock:
            self._end(self._slot(row), revision)
            if self.cells.needs_merge:
                self._merge()
            self.revision = max(self.revision, revision)

    def purge(self, row: int) -> bool:
        """Erase what is kept of a row, here and for every revision. Returns whether there was anything.

        Files that were written before still hold it until the index is saved again.
        """
        with self._lock:
            slot = self.columns.slot_of(row)
            if slot < 0:
                return False
            columns = self.columns
            self.postings.remove(slot)
            columns.died[slot] = columns.born[slot]  # so that no revision sees it
            for array in (columns.tokens, columns.codes, columns.lengths, columns.spans):
                array[slot] = 0
            columns.hashes[:, slot] = 0
            if columns.keys is not None:
                columns.keys[slot] = 0
            self._merge()
            return True

    def search(
        self,
        subjects: Floats,
        relations: Floats,
        query_tokens: Sequence[Sequence[int]] | None,
        k: int,
        revision: int | None = None,
        *,
        rescorer: Rescorer | None = None,
        candidates: int = CANDIDATES,
    ) -> Hits:
        """The `k` entries that are nearest to each question.

        Args:
            subjects: Unit vectors of what the questions are about. [b, half]
            relations: Unit vectors of what they ask of it. [b, half]
            query_tokens: Of each question, for the way by names; None leaves that way out.
            k: How many come back at most.
            revision: See the entries of this revision; None is the newest that the index knows.
            rescorer: What scores the finalists; without one, the addresses that the index keeps.
            candidates: How many entries at least are ranked by their codes.

        Raises:
            ValueError: If the index has forgotten what `revision` saw.
        """
        with self._lock:
            if revision is not None and revision >= self.revision:
                revision = None
            if revision is not None and revision < self.horizon:
                raise ValueError(f"the index begins at revision {self.horizon}, and {revision} was asked for")
            finder = Finder(self.quantiser, self.columns, self.cells, self.postings, revision)
            scorer = rescorer or KeptKeys(subjects, relations)
            return finder.search(subjects, relations, query_tokens, k, scorer, candidates)

    def _enter(
        self,
        numbers: npt.NDArray[np.int64],
        tokens: Slots,
        subjects: Floats,
        relations: Floats,
        spans: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer],
        revisions: npt.NDArray[np.integer],
        *,
        lists: bool,
    ) -> None:
        columns, count = self.columns, len(numbers)
        used = slice(columns.length, columns.length + count)
        columns.rows[used], columns.born[used], columns.died[used] = numbers, revisions, 0
        columns.tokens[used], columns.spans[used], columns.lengths[used] = tokens, spans, lengths
        columns.cells[used] = self.quantiser.cells(subjects, relations)
        columns.codes[used] = self.quantiser.codes(subjects, relations)
        columns.hashes[:, used] = self.quantiser.hashes(subjects, relations)
        if columns.keys is not None:
            columns.keys[used, : self.quantiser.half] = subjects
            columns.keys[used, self.quantiser.half :] = relations
        columns.length = used.stop
        if not lists:
            return
        slots = np.arange(used.start, used.stop, dtype=np.int32)
        if count > max(_LEAST_BULK, used.start // 8):
            new = Postings.of(slots, columns.tokens[used], columns.spans[used, 1])
            self.postings = self.postings.merged(new)
            self._rebuild_cells()
            return
        for slot, cell, line, end in zip(
            slots.tolist(), columns.cells[used].tolist(), tokens, columns.spans[used, 1].tolist(), strict=True
        ):
            if self.cells.needs_merge:
                self._merge()
            self.cells.append(slot, cell)
            self.postings.append(slot, line[:end].tolist())

    @contextmanager
    def still(self) -> Iterator[None]:
        """Keep everybody else out for the time of the block."""
        with self._lock:
            yield

    def also_named(self, row: int, tokens: Sequence[int]) -> None:
        """Let a row be found by tokens that its line has no room for. Raises KeyError if there is no such row."""
        with self._lock:
            self.postings.append(self._slot(row), tokens)

    def rebuild_lists(self) -> None:
        """Make the lists anew from the lines; what `also_named` said is forgotten."""
        used = self.columns.length
        every = np.arange(used, dtype=np.int32)
        self.postings = Postings.of(every, self.columns.tokens[:used], self.columns.spans[:used, 1])
        self._rebuild_cells()

    def tidy(self) -> None:
        """Put what came since into the lists, and what has ended out of those of the cells."""
        self.postings = self.postings.merged()
        self._rebuild_cells()

    def _rebuild_cells(self) -> None:
        columns, used = self.columns, self.columns.length
        live = np.flatnonzero(columns.died[:used] == 0).astype(np.int32)
        self.cells = CellLists.of(self.quantiser.size, live, columns.cells[live])

    def address_of(self, row: int) -> tuple[list[int], tuple[int, int]] | None:
        """The tokens of a row's subject and relation, and where the two end among them; None if there is no such row."""
        slot = self.columns.slot_of(row)
        if slot < 0:
            return None
        first, second = (int(end) for end in self.columns.spans[slot])
        return self.columns.tokens[slot, :second].tolist(), (first, second)

    def _slot(self, row: int) -> int:
        slot = self.columns.slot_of(row)
        if slot < 0:
            raise KeyError(row)
        return slot

    def _end(self, slot: int, revision: int) -> None:
        if not self.columns.died[slot]:
            self.columns.died[slot] = revision
            self.cells.ended += 1

    def _merge(self) -> None:
        used = self.columns.length
        self.cells = self.cells.merged(self.columns.cells[:used], self.columns.died[:used] == 0)
