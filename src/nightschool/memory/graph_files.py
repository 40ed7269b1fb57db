"""The file of the reference server `server-memory`, `memory.jsonl`: an entity or a relation a line.

    {"type": "entity", "name": "Ada", "entityType": "person", "observations": ["lives in Oslo"]}
    {"type": "relation", "from": "Ada", "to": "Acme", "relationType": "works at"}

Other fields of a line are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.data.sources.text_input import text_lines
from nightschool.errors import DataError
from nightschool.memory.entry import NewEntry
from nightschool.memory.facts import key_of
from nightschool.memory.graph_entries import entity_entries, entity_of, is_relation, relation_entry, relation_of
from nightschool.memory.store import MemoryStore

SERVER_MEMORY = "server-memory"
"""What the format is called in commands."""

_ENTITY, _RELATION = ("name", "entityType"), ("from", "to", "relationType")


def read_graph(path: Path, *, source: str | None = None) -> Iterator[NewEntry]:
    """The entries of a file, holding one line at a time.

    Args:
        path: The file.
        source: Where the facts come from; by default the file's name.

    Raises:
        NotFound: If there is no such file.
        DataError: At the first line that is neither an entity nor a relation, with file and line; at the end, of an entity of which
            nothing is said; or if there is no line at all.
    """
    source = path.name if source is None else source
    bare: dict[str, tuple[str, str]] = {}  # entities of which their own line says nothing: name and place
    count = 0
    for number, line in text_lines(path, str(path)):
        if not line.strip():
            continue
        count += 1
        where = f"{path}:{number}"
        fields = _object(line, where)
        if fields.get("type") == "entity":
            name, kind = _texts(fields, _ENTITY, where)
            observations = _observations(fields, where)
            if kind.strip() or observations:
                yield from _placed(entity_entries(name, kind, observations, source=source, where=where), where)
            else:
                bare[key_of(name)] = name, where
        elif fields.get("type") == "relation":
            subject, to, relation = _texts(fields, _RELATION, where)
            bare.pop(key_of(subject), None)
            yield relation_entry(subject, relation, to, source=source, where=where)
        else:
            raise DataError(
                f'{where}: the type is {str(fields.get("type"))[:40]!r}, and a line of {SERVER_MEMORY} has "entity" or "relation". '
                "Correct the line, or leave --format out if the file is another one."
            )
    for name, where in bare.values():
        raise DataError(
            f"{where}: the entity {name[:80]!r} has no type, no observation and no relation, so there is nothing to remember of it. "
            "Give it an entityType, or take the line out."
        )
    if not count:
        raise DataError(f"{path} holds no entities and no relations. Name the memory.jsonl of {SERVER_MEMORY}.")


def _placed(entries: Iterator[NewEntry], where: str) -> Iterator[NewEntry]:
    try:
        yield from entries
    except DataError as error:
        raise DataError(f"{where}: {error} Nothing was stored.") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the line is no JSON: {error}. Write one object a line.") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: the line is no object. Write an entity or a relation.")
    return found


def _texts(fields: dict[str, Any], names: tuple[str, ...], where: str) -> list[str]:
    for name in names:
        if not isinstance(fields.get(name), str):
            what = "is missing" if name not in fields else f"holds {type(fields[name]).__name__}, not text"
            raise DataError(f"{where}: the field {name!r} {what}. Write text.")
    return [fields[name] for name in names]


def _observations(fields: dict[str, Any], where: str) -> list[str]:
    found = fields.get("observations", [])
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise DataError(f"{where}: the field 'observations' is no list of texts. Write one.")
    return found


@dataclass
class GraphLines:
    """The lines of a file, to be read once; then `left_out` counts the sentences about nobody, and `undated` the entries whose dates have no
    place in it.
    """

    lines: Iterator[str]
    left_out: int = 0
    undated: int = 0


def graph_lines(store: MemoryStore, revision: int) -> GraphLines:
    """A revision as a file. What is held at once are the names of the entities, and the entries of one."""
    written = GraphLines(iter(()))
    written.lines = _lines(store, revision, written)
    return written


def _lines(store: MemoryStore, revision: int, written: GraphLines) -> Iterator[str]:
    subjects: dict[str, str] = {}
    for entry in store.sound_entries(at=revision):
        written.undated += entry.valid_from is not None or entry.valid_to is not None
        if entry.subject is None or entry.subject_key is None:
            written.left_out += 1
        else:
            subjects.setdefault(entry.subject_key, entry.subject)
    for name in subjects.values():
        yield _line("entity", entity_of(store.about(name, at=revision), subjects.__contains__))
    for name in subjects.values():
        said = store.about(name, at=revision)
        for one in said:
            if is_relation(one, subjects.__contains__):
                yield _line("relation", relation_of(one, said[0]))


def _line(kind: str, fields: dict[str, Any]) -> str:
    return json.dumps({"type": kind, **fields}, ensure_ascii=False) + "\n"
