"""A memory as the documents' files, and back: bank and mapping, codebooks, and labelled questions.

The bank's row is an entry's place in the revision that was written: `database_index` in the mapping, and a target in labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import numpy.typing as npt
import psutil
from tokenizers import Tokenizer

from nightschool.data.sources.bank_mapping import PARTS, mapping_of, read_mapping
from nightschool.errors import DataError
from nightschool.events import now
from nightschool.memory.encoders.encoder import AddressEncoder
from nightschool.memory.entry import MemoryEntry, NewEntry
from nightschool.memory.index.quantiser import Quantiser
from nightschool.memory.lines import addresses_of
from nightschool.memory.store import MemoryStore
from nightschool.memory.torch_files import check_sizes, read_cache, write_cache
from nightschool.store.atomic import replacing

Floats = npt.NDArray[np.float32]

_SAMPLE, _BATCH = 100_000, 4096
# Rows whose tokens are compared with the mapping.
_COMPARED = 64
_RECORD = dict(zip(PARTS, ("subject", "relation", "value"), strict=True))


@dataclass(frozen=True)
class BankTokenizer:
    """What turns texts into rows of a bank. `pad` stands behind their ends."""

    tokenizer: Tokenizer
    pad: int

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def text(self, row: Sequence[int]) -> str:
        """What a row says; nothing, where it is empty."""
        end = len(row)
        while end and row[end - 1] == self.pad:
            end -= 1
        if not any(row[:end]):  # a slot that nobody filled
            return ""
        return self.tokenizer.decode(list(row[:end]), skip_special_tokens=True).strip()


@dataclass(frozen=True)
class WrittenBank:
    """`cut`: entries that are longer than a row; the mapping has them whole."""

    entries: int
    knowledge_num: int
    knowledge_length: int
    cut: int


def square_for(count: int, wanted: int | None) -> int:
    """The `knowledge_num` of so many entries: what is wanted, or the next perfect square.

    Raises:
        DataError: If what is wanted is no square, or too small.
    """
    least = (isqrt(max(count - 1, 0)) + 1) ** 2
    if wanted is None:
        return least
    check_sizes(wanted, 2)
    if wanted < count:
        raise DataError(f"knowledge_num is {wanted:,}, and there are {count:,} entries. Write {least} or more.")
    return wanted


def write_bank(
    store: MemoryStore, revision: int, path: Path, bank: BankTokenizer, *, knowledge_num: int | None, length: int
) -> WrittenBank:
    """Write a revision as `knowledge_cache.pt`, int64 [knowledge_num, length], and its mapping beside it.

    Raises:
        DataError: If `knowledge_num` is no perfect square or too small, or the bank would take more than half of the free RAM.
    """
    count = store.count(at=revision)
    number = square_for(count, knowledge_num)
    if length < 1:
        raise DataError(f"knowledge_length is {length}; it must be 1 or more.")
    size, free = 8 * number * length, psutil.virtual_memory().available
    if 2 * size > free:
        raise DataError(
            f"A bank [{number}, {length}] takes {size / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB free."
        )
    tokens = np.full((number, length), bank.pad, np.int64)
    cut = 0
    with (
        replacing(mapping_of(path).absolute()) as handle,
        os.fdopen(os.dup(handle), "w", encoding="utf-8") as out,
    ):
        metadata = {
            "total_entries": count,
            "knowledge_num": number,
            "knowledge_length": length,
            "source_file": f"memory {store.folder.name}, revision {revision}",
            "generation_time": now().isoformat(timespec="seconds"),
        }
        out.write(f'{{"metadata": {json.dumps(metadata, ensure_ascii=False)},\n"mappings": [')
        place = 0
        for batch in _batches(store.sound_entries(at=revision)):
            for entry, ids in zip(batch, bank.ids([one.text for one in batch]), strict=True):
                tokens[place, : len(ids)] = ids[:length]
                record = record_of(store, place, entry) | {"token_count": len(ids), "is_truncated": len(ids) > length}
                out.write(f"{',' * (place > 0)}\n{json.dumps(record, ensure_ascii=False)}")
                cut += len(ids) > length
                place += 1
        out.write("\n]}\n")
    write_cache(path, tokens)
    return WrittenBank(count, number, length, cut)


def record_of(store: MemoryStore, place: int, entry: MemoryEntry) -> dict[str, Any]:
    """What a mapping says of an entry at a place of the bank."""
    return {
        "database_index": place,
        "uuid": str(uuid5(NAMESPACE_URL, f"{store.identity}/{entry.id}")),
        "sentence": entry.text,
        **{name: getattr(entry, ours) for name, ours in _RECORD.items()},
    }


@dataclass
class ReadBank:
    """The facts of a bank, one at a time. `overwritten` counts the rows that no longer say what the mapping says."""

    facts: Iterator[NewEntry]
    overwritten: int = 0


def read_bank(path: Path, bank: BankTokenizer, *, source: str | None = None) -> ReadBank:
    """The facts of a `knowledge_cache.pt`: those of its mapping where the row still says the same, else what its tokens say.

    Raises:
        NotFound, Damaged, DataError: As `read_cache`; and if another tokenizer wrote it, or the mapping does not fit.
    """
    tokens = read_cache(path, vocab_size=bank.size)
    mapping = mapping_of(path)
    records = read_mapping(mapping, len(tokens)) if mapping.is_file() else {}
    known = list(islice(records.items(), _COMPARED))
    differing = [place for place, record in known if not _says(bank.text(tokens[place].tolist()), record["sentence"])]
    if known and 2 * len(differing) > len(known):
        place = differing[0]
        raise DataError(
            f"{path}: row {place} reads {bank.text(tokens[place].tolist())[:60]!r}, and its mapping says "
            f"{records[place]['sentence'][:60]!r}: another tokenizer wrote it. Name that one with --base."
        )
    read = ReadBank(iter(()))
    read.facts = _facts(path, bank, tokens, records, read, path.name if source is None else source)
    return read


def _facts(
    path: Path,
    bank: BankTokenizer,
    tokens: npt.NDArray[np.int32],
    records: dict[int, dict[str, Any]],
    read: ReadBank,
    source: str,
) -> Iterator[NewEntry]:
    empty = True
    for place, row in enumerate(tokens):
        said, record, where = bank.text(row.tolist()), records.get(place), f"{path}[{place}]"
        if record is not None and _says(said, record["sentence"]):
            subject, relation, value = (record.get(name) or None for name in _RECORD)
            if not (subject and relation and value):
                subject = relation = value = None
            empty = False
            yield NewEntry(record["sentence"], subject, relation, value, source=source, where=where)
        elif said:
            read.overwritten += record is not None
            empty = False
            yield NewEntry(said, source=source, where=where)
    if empty:
        raise DataError(f"{path} holds no facts: every row is empty.")


def _says(said: str, sentence: str) -> bool:
    """Whether tokens say the beginning of a sentence, whatever they do with spaces and capitals."""
    short, whole = ("".join(text.split()).casefold() for text in (said, sentence))
    return bool(short) and (whole.startswith(short.rstrip("\ufffd")))


def codebooks_of(entries: Sequence[MemoryEntry], encoder: AddressEncoder, knowledge_num: int) -> Floats:
    """Product keys of entries, [2, √knowledge_num, knowledge_dim / 2].

    Raises:
        DataError: If there are no entries.
    """
    _refuse_empty(entries)
    sample = entries[:: max(1, len(entries) // _SAMPLE)]
    return Quantiser.fit(*addresses_of(sample, encoder), knowledge_num).codebooks


@dataclass(frozen=True)
class Label:
    """A question, the rows that are nearest to it, best first, and how near: a mean of two cosines."""

    query: str
    target_indices: list[int]
    target_scores: list[float]


def labels_of(
    queries: Iterable[str], entries: Sequence[MemoryEntry], encoder: AddressEncoder, *, top_k: int, batch_size: int
) -> Iterator[Label]:
    """The `top_k` nearest entries of each question among all.

    Raises:
        DataError: If there are no entries, or their addresses would take more than half of the free RAM.
    """
    _refuse_empty(entries)
    addresses = _all_addresses(entries, encoder)
    iterator, k = iter(queries), min(top_k, len(entries))
    while batch := list(islice(iterator, batch_size)):
        scores = np.concatenate(encoder.encode_queries(batch), axis=1) @ addresses.T / 2
        nearest = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        for query, row, places in zip(batch, scores, nearest, strict=True):
            best = places[np.lexsort((places, -row[places]))]
            yield Label(query, best.tolist(), [round(score, 6) for score in row[best].tolist()])


def _all_addresses(entries: Sequence[MemoryEntry], encoder: AddressEncoder) -> Floats:
    """Subject and relation side by side [entries, 2 · size]."""
    addresses: Floats | None = None
    place = 0
    for part in _batches(entries):
        found = np.concatenate(addresses_of(part, encoder), axis=1)
        if addresses is None:
            size, free = 4 * len(entries) * found.shape[1], psutil.virtual_memory().available
            if 2 * size > free:
                raise DataError(
                    f"The addresses of {len(entries):,} entries take {size / 2**30:.1f} GiB, more than half of the "
                    f"{free / 2**30:.1f} GiB free. Look at fewer with --max-sentences."
                )
            addresses = np.empty((len(entries), found.shape[1]), np.float32)
        addresses[place : place + len(part)] = found
        place += len(part)
    assert addresses is not None, "who has no entries was refused"
    return addresses


def _refuse_empty(entries: Sequence[MemoryEntry]) -> None:
    if not entries:
        raise DataError("The memory has no entries. Add facts first: nightschool memory import.")


def _batches(entries: Iterable[MemoryEntry]) -> Iterator[list[MemoryEntry]]:
    iterator = iter(entries)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
