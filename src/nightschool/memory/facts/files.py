"""Facts of files: JSON Lines, JSON, CSV, Parquet and text, one entry at a time and each with the line where it stands.

A row has a sentence, or subject, relation and value, or both, under any of the names below. The documents' knowledge base is
read as it is: `[{"target": [{"sentence", "subject", "predicate", "object", "uuid"}]}]`. A text file has a sentence a line, or
three parts with tabs between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from nightschool.data.sources.rows import read_rows
from nightschool.data.sources.text_input import text_lines
from nightschool.errors import DataError
from nightschool.memory.entry import NewEntry, parse_moment

NAMES: dict[str, tuple[str, ...]] = {
    "text": ("wording", "text", "sentence", "fact", "statement", "content"),
    "subject": ("subject", "head", "s"),
    "relation": ("relation", "predicate", "property", "p"),
    "value": ("value", "object", "tail", "o"),
    "source": ("source",),
    "valid_from": ("valid_from",),
    "valid_to": ("valid_to",),
}
"""What a field of a row may be called; the first that is there and not empty is taken."""

_TARGET = "target"
_DATES = ("valid_from", "valid_to")


def read_facts(path: Path, *, source: str | None = None) -> Iterator[NewEntry]:
    """Read the facts of a file, holding one at a time. Where each stands goes into its `where`.

    Args:
        path: The file.
        source: Where the facts come from, for those that do not say; by default the file's name.

    Raises:
        NotFound: If there is no such file.
        DataError: At the first row that is no fact, with file and line; or if there is no fact at all.
    """
    default = path.name if source is None else source
    found = _lines(path, default) if path.suffix.lower() in (".txt", ".md") else _rows(path, default)
    count = 0
    for count, entry in enumerate(found, start=1):  # noqa: B007  counted for what follows
        yield entry
    if not count:
        raise DataError(f"{path} holds no facts. Write one a line: a sentence, or subject, relation and value.")


def fact_of(fields: Mapping[str, Any], where: str, default_source: str = "") -> NewEntry:
    """The fact of one row.

    Raises:
        DataError: If it has none, or its fields are no text.
    """
    taken = {kind: _taken(fields, names, where) for kind, names in NAMES.items()}
    if not any(taken[kind] for kind in ("text", "subject", "relation", "value")):
        known = ", ".join(str(name) for name in list(fields)[:8]) or "nothing"
        is_graph = "entityType" in fields or "relationType" in fields
        instead = "Add --format server-memory." if is_graph else "Write text, or subject, relation and value."
        raise DataError(f"{where}: the fact is empty: the row has {known}. {instead}")
    return NewEntry(
        taken["text"] or "",
        taken["subject"],
        taken["relation"],
        taken["value"],
        source=taken["source"] or default_source,
        valid_from=_moment(taken["valid_from"], "valid_from", where),
        valid_to=_moment(taken["valid_to"], "valid_to", where),
        where=where,
    )


def _rows(path: Path, default: str) -> Iterator[NewEntry]:
    for row in read_rows(path):
        inner = row.fields.get(_TARGET)
        if isinstance(inner, list) and all(isinstance(one, dict) for one in inner):
            for number, one in enumerate(inner, start=1):
                yield fact_of(one, f"{row.where} ({_TARGET} {number})" if len(inner) > 1 else row.where, default)
        else:
            yield fact_of(row.fields, row.where, default)


def _lines(path: Path, default: str) -> Iterator[NewEntry]:
    for number, line in text_lines(path, str(path)):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.rstrip("\r\n").split("\t")]
        where = f"{path}:{number}"
        if len(parts) == 3:
            yield fact_of(dict(zip(("subject", "relation", "value"), parts, strict=True)), where, default)
        else:
            yield fact_of({"text": line}, where, default)


def _taken(fields: Mapping[str, Any], names: tuple[str, ...], where: str) -> str | None:
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{where}: the field {name!r} holds {type(value).__name__}, not text. Write text.")
        text = str(value)
        if text.strip():
            return text
    return None


def _moment(text: str | None, name: str, where: str) -> datetime | None:
    if text is None:
        return None
    try:
        return parse_moment(text)
    except ValueError:
        raise DataError(
            f"{where}: the field {name!r} is {text[:40]!r}, which is no date. Write 2026-11-27 or 2026-11-27T08:00:00Z."
        ) from None
