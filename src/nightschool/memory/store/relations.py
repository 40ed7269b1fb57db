"""Which relations have one value at a time, and which have several.

A new value of a single-valued relation supersedes the old one; of a multi-valued one it stands beside it. A relation that
nobody has set, and that is not in the list below, is single-valued: what is superseded stays in the history.
"""

from __future__ import annotations

import sqlite3
from typing import Literal

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

    def of(self, relation_key: str) -> Cardinality:
        found = self._set.get(relation_key)
        if found is not None:
            return found
        return MULTI if relation_key in MULTI_VALUED else SINGLE
