"""Addresses: by them the entries are found that are about a subject and a relation, or say a sentence.

An address is a number that is told from the normalised subject and relation, or from the sentence. The table `addresses` has
each one that an entry ever had, so that no edit, end or rollback that leaves the subject and relation as they are touches it:
they write one behind the other, however large the memory is. Of an entry the newest row is looked at, and compared with the
words themselves: two subjects may share an address.
"""

from __future__ import annotations

from hashlib import blake2b

_RELATION_BITS = 23
_SUBJECT_BYTES, _RELATION_BYTES = 5, 3

SENTENCES = (-(1 << 63), -1)
"""The first and last address of sentences; those of subjects and relations are not negative."""
EVERY_ROW = (1 << 63) - 1
"""No row has a larger number."""


def address_of(subject_key: str | None, relation_key: str | None, text_key: int | None) -> int:
    """The address of a row: a signed number of 64 bits. Addresses of one subject follow each other."""
    if subject_key is None or relation_key is None:
        assert text_key is not None
        return ~(text_key & EVERY_ROW)
    return of_subject(subject_key)[0] + (_number(relation_key, _RELATION_BYTES) >> 8 * _RELATION_BYTES - _RELATION_BITS)


def of_subject(subject_key: str) -> tuple[int, int]:
    """The first and last address of a subject, whatever the relation."""
    first = _number(subject_key, _SUBJECT_BYTES) << _RELATION_BITS
    return first, first + (1 << _RELATION_BITS) - 1


def _number(key: str, size: int) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=size).digest(), "big")


def newest_row(entry: str) -> str:
    """SQL for the number of an entry's newest row up to the row `:until`: its first has the entry's own number.

    Args:
        entry: The SQL for the entry's number.
    """
    later = f"SELECT max(row) FROM rows later WHERE later.entry = {entry} AND later.row > later.entry AND later.row <= :until"  # noqa: S608
    return f"coalesce(({later}), {entry})"


def at_addresses(where: str) -> str:
    """SQL for the newest rows up to `:until`, ended or not, of entries whose addresses fulfil a condition. What they say now may have others."""
    entries = f"(SELECT DISTINCT entry AS about FROM addresses WHERE {where})"  # noqa: S608
    return f"{entries} CROSS JOIN rows ON rows.row = {newest_row('about')}"
