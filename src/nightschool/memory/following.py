"""An index made from a store, and kept at its newest revision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from math import isqrt

import numpy as np
import numpy.typing as npt

from nightschool.memory.encoders.encoder import AddressEncoder
from nightschool.memory.encoders.names import Vocabulary
from nightschool.memory.entry import MemoryEntry
from nightschool.memory.index.index import MemoryIndex
from nightschool.memory.index.quantiser import Quantiser
from nightschool.memory.lines import addresses_of, lines_of
from nightschool.memory.store import MemoryStore

Floats = npt.NDArray[np.float32]

KNOWLEDGE_LENGTH = 16
_LEAST_CELLS = 1024
# Entries that a quantiser is fitted to, and entries that are encoded at a time.
_SAMPLE, _BATCH = 100_000, 4096
# With so many times the entries that it was fitted to, a quantiser has too few cells.
_OUTGROWN = 4


class Follower:
    """Knows how entries become lines and addresses."""

    def __init__(self, store: MemoryStore, encoder: AddressEncoder, vocabulary: Vocabulary) -> None:
        self._store, self._encoder, self._vocabulary = store, encoder, vocabulary

    def build(self, revision: int, codebooks: Floats | None = None) -> MemoryIndex:
        """An index of the entries of a revision; with product keys [2, K, half] that are given, in place of fitted ones."""
        count = self._store.count(at=revision)
        quantiser = self._quantiser(count, revision)
        if codebooks is not None:
            quantiser = replace(quantiser, codebooks=codebooks)
        index = MemoryIndex.empty(quantiser, KNOWLEDGE_LENGTH, keeps_keys=self._encoder.keeps_keys)
        index.columns.reserve(count)
        beyond: list[tuple[int, list[int]]] = []
        for batch in _batches(self._store.entries(at=revision)):
            beyond += self._add(index, batch, lists=False)
        index.rebuild_lists()
        for row, tokens in beyond:
            index.also_named(row, tokens)
        index.revision, index.horizon, index.fitted_on = revision, revision, count
        return index

    def follow(self, index: MemoryIndex, revision: int) -> int:
        """Enter what happened to the store since the index's revision, up to `revision` or newer. Returns rows that were purged."""
        waiting: list[MemoryEntry] = []
        purged = 0
        for change in self._store.changes_since(index.revision):
            entry = change.entry
            if change.kind == "born" and entry is not None:
                waiting.append(entry)
                if len(waiting) == _BATCH:
                    self._enter(index, waiting)
                    waiting = []
                continue
            self._enter(index, waiting)
            waiting = []
            if change.kind == "purged":
                purged += index.purge(change.row)
            elif index.address_of(change.row) is not None:
                index.end(change.row, change.revision)
        self._enter(index, waiting)
        index.revision = max(index.revision, revision)
        return purged

    def is_outgrown(self, index: MemoryIndex) -> bool:
        """Whether there are far more entries than the index's quantiser was fitted to."""
        return index.columns.length > _OUTGROWN * max(index.fitted_on, _LEAST_CELLS // _OUTGROWN)

    def _enter(self, index: MemoryIndex, entries: list[MemoryEntry]) -> None:
        """Add rows, in their order; those that replace one with the same address take it over."""
        fresh: list[MemoryEntry] = []
        for entry in entries:
            taken = None if entry.replaces is None else index.address_of(entry.replaces)
            if taken is None:
                fresh.append(entry)
                continue
            lines = lines_of([entry], self._vocabulary, KNOWLEDGE_LENGTH)
            spans = (int(lines.spans[0, 0]), int(lines.spans[0, 1]))
            if lines.beyond or (lines.tokens[0, : spans[1]].tolist(), spans) != taken:
                fresh.append(entry)
                continue
            self._add_with_names(index, fresh)
            fresh = []
            assert entry.replaces is not None
            length = int(lines.lengths[0])
            index.replace(entry.replaces, entry.row, lines.tokens[0], entry.born, length=length)
        self._add_with_names(index, fresh)

    def _add_with_names(self, index: MemoryIndex, entries: list[MemoryEntry]) -> None:
        for row, tokens in self._add(index, entries):
            index.also_named(row, tokens)

    def _add(
        self, index: MemoryIndex, entries: list[MemoryEntry], *, lists: bool = True
    ) -> list[tuple[int, list[int]]]:
        """Add rows. Returns those whose subject and relation have no room in a line, with the tokens that are left."""
        if not entries:
            return []
        lines = lines_of(entries, self._vocabulary, KNOWLEDGE_LENGTH)
        subjects, relations = addresses_of(entries, self._encoder)
        index.add(
            np.array([entry.row for entry in entries]),
            lines.tokens,
            subjects,
            relations,
            np.array([entry.born for entry in entries]),
            spans=lines.spans,
            lengths=lines.lengths,
            lists=lists,
        )
        return [(entries[place].row, tokens) for place, tokens in lines.beyond.items()]

    def _quantiser(self, count: int, revision: int) -> Quantiser:
        cells = max(_LEAST_CELLS, (isqrt(max(count - 1, 0)) + 1) ** 2)
        step = max(1, count // _SAMPLE)
        sample = list(islice(self._store.entries(at=revision), 0, None, step))
        if not sample:  # of nothing: whatever comes first makes the index anew
            half = self._encoder.knowledge_dim // 2
            vectors = np.random.default_rng(0).standard_normal((2, 256, half)).astype(np.float32)
            subjects, relations = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
        else:
            subjects, relations = addresses_of(sample, self._encoder)
        return Quantiser.fit(subjects, relations, cells)


def _batches(entries: Iterable[MemoryEntry]) -> Iterator[list[MemoryEntry]]:
    iterator = iter(entries)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
