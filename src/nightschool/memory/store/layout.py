"""The tables of a memory's file, and the digests by which a flipped bit is found.

A row of `rows` is written once and then only ended (`died`) or purged. Everything that is kept carries a digest of what it
was written with; how many rows a revision ended, and the sum of their numbers (`ended_rows`), are kept with the revision.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

FORMAT = 2
"""`PRAGMA user_version` of the files that this code writes."""
APPLICATION_ID = 0x4E534D31
"""`NSM1` in ASCII: by it a file is known to be a memory."""

ROW_COLUMNS = (
    "row", "entry", "text", "wording", "subject", "relation", "value", "subject_key", "relation_key", "source", "author",
    "valid_from", "valid_to", "recorded_at", "born", "replaces",
)  # fmt: skip
"""What never changes in a row."""
CONTENT_COLUMNS = ROW_COLUMNS[1:-2]
"""What an entry says, which a row that brings it back has as well: with `text_key` it is what the digest is of.

Which revision wrote a row is told by its number, because those of a revision follow each other.
"""

TABLES = """
CREATE TABLE about (identity TEXT NOT NULL, made_at INTEGER NOT NULL, purge_pending INTEGER NOT NULL DEFAULT 0);
CREATE TABLE rows (
  row INTEGER PRIMARY KEY,
  entry INTEGER NOT NULL,
  text TEXT NOT NULL,
  wording TEXT,
  subject TEXT,
  relation TEXT,
  value TEXT,
  subject_key TEXT,
  relation_key TEXT,
  text_key INTEGER,
  source TEXT NOT NULL,
  author TEXT NOT NULL,
  valid_from INTEGER,
  valid_to INTEGER,
  recorded_at INTEGER NOT NULL,
  born INTEGER NOT NULL,
  replaces INTEGER,
  digest BLOB NOT NULL,
  died INTEGER
);
CREATE INDEX rows_entry ON rows (entry) WHERE row > entry;
CREATE INDEX rows_died ON rows (died) WHERE died IS NOT NULL;
CREATE TABLE addresses (address INTEGER NOT NULL, entry INTEGER NOT NULL, PRIMARY KEY (address, entry)) WITHOUT ROWID;
CREATE TABLE revisions (
  revision INTEGER PRIMARY KEY,
  at INTEGER NOT NULL,
  author TEXT NOT NULL,
  operation TEXT NOT NULL,
  note TEXT NOT NULL,
  restores INTEGER,
  last_row INTEGER NOT NULL,
  born INTEGER NOT NULL,
  ended INTEGER NOT NULL,
  ended_rows INTEGER NOT NULL,
  digest BLOB NOT NULL
);
CREATE TABLE versions (
  name TEXT PRIMARY KEY,
  revision INTEGER NOT NULL,
  at INTEGER NOT NULL,
  author TEXT NOT NULL,
  digest BLOB NOT NULL
);
CREATE TABLE purged (
  row INTEGER PRIMARY KEY,
  entry INTEGER NOT NULL,
  born INTEGER NOT NULL,
  died INTEGER NOT NULL,
  revision INTEGER NOT NULL,
  digest BLOB NOT NULL
);
CREATE INDEX purged_revision ON purged (revision);
CREATE TABLE relations (relation_key TEXT PRIMARY KEY, cardinality TEXT NOT NULL CHECK (cardinality IN ('single', 'multi')));
CREATE TABLE settled (row_a INTEGER NOT NULL, row_b INTEGER NOT NULL, PRIMARY KEY (row_a, row_b)) WITHOUT ROWID;
"""

FROM_1 = """
DROP INDEX rows_entry;
DROP INDEX rows_address;
DROP INDEX rows_sentence;
CREATE INDEX rows_entry ON rows (entry) WHERE row > entry;
CREATE TABLE addresses (address INTEGER NOT NULL, entry INTEGER NOT NULL, PRIMARY KEY (address, entry)) WITHOUT ROWID;
INSERT OR IGNORE INTO addresses SELECT address_of(subject_key, relation_key, text_key), entry FROM rows;
PRAGMA user_version = 2
"""
"""What makes a file of the form 1, which had indexes of living rows, one of the form 2."""


def digest_of(values: Iterable[Any]) -> bytes:
    """Eight bytes of BLAKE2b over the values of a row."""
    return blake2b("\x1f".join(map(str, values)).encode(), digest_size=8).digest()
