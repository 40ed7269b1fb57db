"""The mapping beside a bank or beside labels: `NAME_mapping.json`, which says what the rows are that others name by number.

`{"metadata": {…}, "mappings": [{"database_index": 0, "sentence": "Ada lives in Oslo.", "subject": "Ada", …}]}`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil

from nightschool.errors import DataError
from nightschool.store.atomic import read_json

PARTS = ("subject", "predicate", "object")
"""What a record says of a fact beside its sentence, where it is known."""

# What a mapping takes in RAM as a multiple of its file.
_PARSED = 6


def mapping_of(path: Path) -> Path:
    """Where the mapping of a file lies."""
    return path.with_name(f"{path.stem}_mapping.json")


def read_mapping(path: Path, knowledge_num: int | None = None) -> dict[int, dict[str, Any]]:
    """The records of a mapping by their rows; of a bank of `knowledge_num` rows, if there is one.

    Raises:
        NotFound, Damaged: If there is none, or it is no JSON object.
        DataError: If a record lacks its sentence or has no place among the rows, or the file takes more than half of the free RAM.
    """
    if path.is_file():
        size, free = _PARSED * path.stat().st_size, psutil.virtual_memory().available
        if 2 * size > free:
            raise DataError(
                f"{path} takes about {size / 2**30:.1f} GiB to read, more than half of the {free / 2**30:.1f} GiB free. Move it away, "
                "and the entries are read from their tokens."
            )
    records: dict[int, dict[str, Any]] = {}
    most = sys.maxsize if knowledge_num is None else knowledge_num
    mappings = read_json(path).get("mappings")
    if not isinstance(mappings, list):
        raise DataError(f'{path} has no list of "mappings".')
    for number, record in enumerate(mappings):
        place = record.get("database_index", number) if isinstance(record, dict) else None
        if type(place) is not int or not 0 <= place < most or not isinstance(record.get("sentence"), str):
            rows = "of 0 or more" if knowledge_num is None else f"below the {knowledge_num} rows of the bank"
            raise DataError(f"{path}: mappings[{number}] needs a sentence, and a database_index {rows}.")
        texts = [record.get(name) for name in PARTS]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise DataError(f"{path}: mappings[{number}]: {', '.join(PARTS)} must be text.")
        records[place] = record
    return records
