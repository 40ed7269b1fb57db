"""Which relations have one value at a time, and which have several.

A new value of a single-valued relation supersedes the old one; of a multi-valued one it stands beside it. A relation that
nobody has set, and that is not in the list below, is single-valued: what is superseded stays in the history.
"""

from __future__ import annotations

import sqlite3
from typing import Literal

from nightschool.errors import UsageError
from nightschool.memory.facts.normalise import relation_key_of

Cardinality = Literal["single", "multi"]
SINGLE: Cardinality = "single"
MULTI: Cardinality = "multi"

MULTI_VALUED = frozenset(
    [
        "speaks",
        "speaks language",
        "languages spoken",
        "likes",
        "loves",
        "hates",
        "dislikes",
        "enjoys",
        "knows",
        "owns",
        "has",
        "has visited",
        "visited",
        "can",
        "has child",
        "child",
        "children",
        "son",
        "daughter",
        "has sibling",
        "sibling",
        "brother",
        "sister",
        "friend",
        "friends",
        "is a friend of",
        "friend of",
        "is allergic to",
        "allergic to",
        "member of",
        "is a member of",
        "is member of",
        "belongs to",
        "genre",
        "instance of",
        "is an instance of",
        "is a",
        "is an",
        "subclass of",
        "part of",
        "is part of",
        "has part",
        "shares border with",
        "borders",
        "award received",
        "won",
        "cast member",
        "wrote",
        "author of",
        "notable work",
        "field of work",
        "occupation",
        "works as",
        "hobby",
        "uses",
        "contains",
        "includes",
        "taught",
        "studied at",
        "educated at",
        "played for",
        "played with",
        "official language",
        "twinned administrative body",
        "diplomatic relation",
    ]
)
"""Relations that usually have several values at a time, in their normalised form."""


class Relations:
    """The cardinalities that were set in one memory, over the defaults."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._set: dict[str, Cardinality] = dict(
            connection.execute("SELECT relation_key, cardinality FROM relations").fetchall()
        )

    @property
    def set_here(self) -> dict[str, Cardinality]:
        """What was set, by the normalised relation."""
        return dict(self._set)

    def of(self, relation_key: str) -> Cardinality:
        found = self._set.get(relation_key)
        if found is not None:
            return found
        return MULTI if relation_key in MULTI_VALUED else SINGLE


def set_relation(connection: sqlite3.Connection, relation: str, cardinality: Cardinality | None) -> None:
    """Set how many values a relation has at a time; None forgets what was set.

    Raises:
        UsageError: If the relation is empty, or the cardinality is neither `single` nor `multi`.
    """
    key = relation_key_of(relation)
    if not key or cardinality not in (None, SINGLE, MULTI):
        raise UsageError(f"Write a relation and single or multi, not {relation[:80]!r} and {cardinality!r}.")
    if cardinality is None:
        connection.execute("DELETE FROM relations WHERE relation_key = ?", (key,))
    else:
        connection.execute("INSERT OR REPLACE INTO relations VALUES (?, ?)", (key, cardinality))
