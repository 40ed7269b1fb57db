"""What the index keeps of an entry: the tokens of its subject, its relation and its value, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nightschool.memory.encoders.encoder import AddressEncoder
from nightschool.memory.encoders.names import Vocabulary
from nightschool.memory.entry import MemoryEntry

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EntryLines:
    """Of n entries: `tokens` [n, L], `spans` [n, 2] where subject and relation end, `lengths` [n] of the whole, uncut.

    `beyond`: by the place of an entry, the tokens of its subject and relation that have no room in its line.
    """

    tokens: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    beyond: dict[int, list[int]]


def address_texts(entry: MemoryEntry) -> tuple[str, str, str]:
    """Subject, relation and value; of a sentence without them, its text and twice nothing."""
    if entry.subject is None or entry.relation is None or entry.value is None:
        return entry.text, "", ""
    return entry.subject, entry.relation.replace("_", " "), entry.value


def lines_of(entries: Sequence[MemoryEntry], vocabulary: Vocabulary, width: int) -> EntryLines:
    """The lines of entries, cut at `width` tokens; nothing is lost, for the store has the text."""
    parts = [address_texts(entry) for entry in entries]
    encoded = vocabulary.tokens_of([text for part in parts for text in part])
    tokens = np.zeros((len(entries), width), np.int32)
    spans, lengths = np.zeros((len(entries), 2), np.int64), np.zeros(len(entries), np.int64)
    beyond: dict[int, list[int]] = {}
    for place in range(len(entries)):
        subject, relation, value = encoded[3 * place : 3 * place + 3]
        if len(subject) + len(relation) > width:
            beyond[place] = (subject + relation)[width:]
        whole = subject + relation + value
        tokens[place, : len(whole)] = whole[:width]
        spans[place] = min(len(subject), width), min(len(subject) + len(relation), width)
        lengths[place] = min(len(whole), 65_535)
    return EntryLines(tokens, spans, lengths, beyond)


def addresses_of(entries: Sequence[MemoryEntry], encoder: AddressEncoder) -> tuple[Floats, Floats]:
    """The addresses of entries; a sentence without a relation is addressed by the whole of it, twice."""
    parts = [address_texts(entry) for entry in entries]
    return encoder.encode_addresses([one[0] for one in parts], [one[1] or one[0] for one in parts])
