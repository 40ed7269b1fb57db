"""Which relations have one value at a time, and which have several.

A new value of a single-valued relation supersedes the old one; of a multi-valued one it stands beside it. Where nobody has
set it, the lists of `facts/words.py` decide, and for what is in none of them: what people do has several values (`speaks`,
`visited`), what things are and have has one (`capital`, `was born in`). What is superseded stays in the history.
"""

from __future__ import annotations

import sqlite3
from functools import lru_cache
from typing import Literal

from nightschool.errors import UsageError
from nightschool.memory.facts.normalise import relation_key_of
from nightschool.memory.facts.words import MULTI_VALUED, SINGLE_VALUED, VERBS

Cardinality = Literal["single", "multi"]
SINGLE: Cardinality = "single"
MULTI: Cardinality = "multi"


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
        return self._set.get(relation_key) or _default(relation_key)


@lru_cache(maxsize=4096)
def _default(relation_key: str) -> Cardinality:
    if relation_key in MULTI_VALUED:
        return MULTI
    verb = relation_key.partition(" ")[0]
    return MULTI if verb in VERBS and relation_key not in SINGLE_VALUED else SINGLE


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
