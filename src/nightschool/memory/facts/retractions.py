"""Retractions: entries that take a statement back. They say nothing that could be read; they end or hide what says it.

`Ada no longer lives in Oslo.` takes back one value of one relation; `No longer: ` before any statement takes that back, whatever
the rules make of it. A statement is known by its normalised subject, relation and value, or as a sentence by its words.
"""

from __future__ import annotations

import re
from hashlib import blake2b

from nightschool.memory.entry import MemoryEntry, NewEntry
from nightschool.memory.facts.normalise import key_of, relation_key_of, sentence_key_of
from nightschool.memory.facts.sentences import retracted, split_sentence

StatementKey = tuple[str, str, str] | int
"""The normalised subject, relation and value; or the number of a sentence."""
PREFIX = "No longer: "
_PREFIXED = re.compile(r"\s*no longer:\s*(?=\S)", re.IGNORECASE)


def behind_prefix(text: str) -> str | None:
    """The statement that `No longer: ` stands before; None if it does not."""
    match = _PREFIXED.match(text)
    return None if match is None else text[match.end() :]


def taken_back(sentence: str) -> StatementKey | None:
    """What a sentence without subject and relation of its own says is no longer so."""
    stated = behind_prefix(sentence)
    if stated is not None:
        return _said_by(stated)
    found = retracted(sentence)
    return None if found is None else (key_of(found.subject), relation_key_of(found.relation), key_of(found.value))


def is_retraction(entry: MemoryEntry) -> bool:
    """Whether an entry only takes something back."""
    return entry.subject is None and taken_back(entry.text) is not None


def retraction_of(entry: MemoryEntry, source: str) -> NewEntry:
    """What takes an entry's statement back."""
    return NewEntry(PREFIX + entry.text, source=source)


def retraction_key(statement: StatementKey) -> int:
    """A number for what takes a statement back: the same however it is worded (63 bits of BLAKE2b)."""
    parts = statement if isinstance(statement, tuple) else (str(statement),)
    digest = blake2b("\x1f".join(("no longer", *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keys_that_retract(entry: MemoryEntry) -> set[int]:
    """The numbers of retractions that take an entry's statement back: by its subject, relation and value, and by its words."""
    statements = {_said_by(entry.text)}
    if entry.subject_key is not None and entry.relation_key is not None:
        statements.add((entry.subject_key, entry.relation_key, key_of(entry.value or "")))
    return set(map(retraction_key, statements))


def _said_by(text: str) -> StatementKey:
    triple = split_sentence(text)
    if triple is None:
        return sentence_key_of(text)
    return key_of(triple.subject), relation_key_of(triple.relation), key_of(triple.value)
