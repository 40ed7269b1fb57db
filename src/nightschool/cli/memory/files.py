"""`nightschool memory build, import, export, check`: memories and files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from nightschool.cli.memory import counts_of, opened
from nightschool.cli.memory.bank_files import BANK_ENDING, export_bank, facts_of_bank
from nightschool.cli.output import answer, who
from nightschool.errors import Conflict, UsageError
from nightschool.memory.checking import check_memory, remove_damaged_indexes
from nightschool.memory.entry import Change, MemoryEntry, NewEntry
from nightschool.memory.facts.files import read_facts
from nightschool.memory.following import KNOWLEDGE_LENGTH
from nightschool.memory.graph_files import graph_lines, read_graph
from nightschool.memory.store import MemoryStore
from nightschool.store.atomic import remove_folder, replacing
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.units import format_bytes

Format = Literal["server-memory"]

_FIELDS = (
    "id",
    "text",
    "wording",
    "subject",
    "relation",
    "value",
    "source",
    "author",
    "valid_from",
    "valid_to",
    "recorded_at",
)


def build(
    name: str,
    /,
    *,
    from_: tuple[Path, ...] = (),
    format_: Format | None = None,
    source: str | None = None,
    base: str | None = None,
    cache: Path | None = None,
    knowledge_num: int | None = None,
    knowledge_length: int = KNOWLEDGE_LENGTH,
    force: bool = False,
) -> None:
    """Make a memory, empty or with the facts of files.

    A file holds subject, relation and value, or sentences, or both: JSON Lines, JSON, CSV, Parquet or text; or tokens, as
    knowledge_cache.pt, of which the mapping beside it says the texts.

    Args:
        name: How the memory is called: NAME, or TENANT/NAME.
        from_: A file of facts. May be given several times.
        format_: What is in the files, where their endings do not say: server-memory is the memory.jsonl of that reference server.
        source: Where the facts come from, for those that do not say; by default the name of their file.
        base: The model whose tokenizer reads and writes .pt files.
        cache: Write the entries as knowledge_cache.pt too, with the mapping beside it.
        knowledge_num: Rows of the cache, a perfect square; by default the next one.
        knowledge_length: Tokens of a row of the cache.
        force: Replace the cache if it is there; a memory that is there stays.
    """
    if cache is not None:
        _refuse_cache(cache)
    folder = memory_path(Home.find(), name)
    store = MemoryStore.create(folder)
    try:
        with store:
            change = _read_into(store, from_, source, "build", base, format_) if from_ else Change(0)
            if cache is not None:
                export_bank(
                    store,
                    store.revision,
                    cache,
                    base=base,
                    knowledge_num=knowledge_num,
                    knowledge_length=knowledge_length,
                    force=force,
                )
    except BaseException:
        # Nothing was stored: the name is free for the next attempt.
        remove_folder(folder)
        raise
    _say(name, change, f"Made the memory {name}")


def import_(
    name: str, /, *files: Path, format_: Format | None = None, source: str | None = None, base: str | None = None
) -> None:
    """Add the facts of files to a memory, all or none. New values take the place of old ones.

    Args:
        name: The memory.
        files: Files of facts, as for build.
        format_: As for build.
        source: Where the facts come from, for those that do not say; by default the name of their file.
        base: The model whose tokenizer reads .pt files.
    """
    if not files:
        raise UsageError("Name at least one file of facts.")
    with opened(name) as store:
        change = _read_into(store, files, source, "import", base, format_)
    _say(name, change, f"Read {', '.join(map(str, files))} into {name}")


def export(
    name: str,
    file: Path,
    /,
    *,
    at: str | None = None,
    format_: Format | None = None,
    base: str | None = None,
    knowledge_num: int | None = None,
    knowledge_length: int = KNOWLEDGE_LENGTH,
    force: bool = False,
) -> None:
    """Write the entries of a memory to a file, which import reads again: JSON Lines, JSON, CSV, text or tokens by its ending.

    Args:
        name: The memory.
        file: A file that ends in .jsonl, .json, .csv, .txt or .pt. Text keeps the statements alone. Tokens are int64
            [knowledge_num, knowledge_length], and a mapping beside them has the texts.
        at: A revision or a named version; by default the newest.
        format_: server-memory writes entities, observations and relations, as that reference server keeps them in its memory.jsonl.
        base: The model whose tokenizer writes a .pt file.
        knowledge_num: Rows of a .pt file, a perfect square; by default the next one.
        knowledge_length: Tokens of a row of a .pt file.
        force: Replace the file if it is there.
    """
    ending = file.suffix.lower()
    if format_ is None and ending == BANK_ENDING:
        with opened(name) as store:
            revision = store.revision_at(at)
            written = export_bank(
                store,
                revision,
                file,
                base=base,
                knowledge_num=knowledge_num,
                knowledge_length=knowledge_length,
                force=force,
            )
        shape = [written.knowledge_num, written.knowledge_length]
        answer(
            {"name": name, "revision": revision, "path": str(file), "shape": shape, "cut": written.cut},
            f"Wrote revision {revision} of {name} to {file}: {written.entries:,} entries in {shape}.",
            quiet=str(file),
        )
        return
    if format_ is None and ending not in _WRITTEN:
        endings = ", ".join([*_WRITTEN, BANK_ENDING])
        raise UsageError(f"{file}: the ending {ending or '(none)'} is not known. Write {endings}.")
    if file.exists() and not force:
        raise Conflict(f"{file} is there already. Choose another name, or add --force.")
    with opened(name) as store:
        revision = store.revision_at(at)
        if format_ is None:
            _write_lines(file, _WRITTEN[ending](store.sound_entries(at=revision)))
            lost = {}
        else:
            graph = graph_lines(store, revision)
            _write_lines(file, graph.lines)
            lost = {"left_out": graph.left_out, "undated": graph.undated}
    size = file.stat().st_size
    text = [f"Wrote revision {revision} of {name} to {file} ({format_bytes(size)})."]
    text += [f"{_LOST[what]}: {count:,}." for what, count in lost.items() if count]
    answer(
        {"name": name, "revision": revision, "path": str(file), "size_bytes": size} | lost,
        "\n".join(text),
        quiet=str(file),
    )


_LOST = {
    "left_out": "Left out, because no subject can be told of them",
    "undated": "Written without the dates when they hold",
}


def _write_lines(file: Path, lines: Iterator[str]) -> None:
    with replacing(file.absolute()) as handle, os.fdopen(os.dup(handle), "w", encoding="utf-8", newline="") as out:
        out.writelines(lines)


def check(name: str, /, *, rebuild_index: bool = False) -> int:
    """Compare every entry, revision and version of a memory with its digest, and its indexes with theirs; name what was altered.

    Args:
        name: The memory.
        rebuild_index: Remove indexes that are damaged, so that the next question makes them anew. Entries stay as they are.
    """
    with opened(name) as store:
        report = check_memory(store)
        removed = [one.file for one in report.findings if one.file is not None] if rebuild_index else []
        if removed:
            report = remove_damaged_indexes(store, report)
    if report.is_whole:
        remedy = "All is as it was written."
    elif report.is_whole_but_for_indexes:
        remedy = (
            f"The entries are whole, an index alone is damaged: nightschool memory check {name} --rebuild-index removes it, and the next "
            f"question makes it anew."
        )
    else:
        remedy = (
            "Entries that are named can be edited, ended or purged (nightschool memory edit, rm); the rest comes back from a "
            "copy of the memory, or by building it anew."
        )
    lines = [
        f"{name}: {report.rows:,} rows of entries and {report.revisions:,} revisions were read.",
        *(f"Removed the index with {file}; the next question makes it anew." for file in removed),
        *(one.message for one in report.findings),
        remedy,
    ]
    answer(
        {"name": name, **report.to_json()}, "\n".join(lines), quiet="" if report.is_whole else "\n".join(lines[1:-1])
    )
    return 0 if report.is_whole else 1


def _refuse_cache(cache: Path) -> None:
    if cache.suffix.lower() != BANK_ENDING:
        raise UsageError(f"--cache {cache}: a file of tensors ends in {BANK_ENDING}. Write knowledge_cache.pt.")


def _read_into(
    store: MemoryStore,
    files: tuple[Path, ...],
    source: str | None,
    operation: str,
    base: str | None,
    format_: Format | None,
) -> Change:
    facts = chain.from_iterable(_facts_of(file, source, base, format_) for file in files)
    return store.add(facts, author=who(), operation=operation)


def _facts_of(file: Path, source: str | None, base: str | None, format_: Format | None) -> Iterator[NewEntry]:
    if format_ is not None:
        return read_graph(file, source=source)
    if file.suffix.lower() in (BANK_ENDING, ".pth"):
        return facts_of_bank(file, base, source)
    return read_facts(file, source=source)


def _say(name: str, change: Change, done: str) -> None:
    said = counts_of(change) or "nothing in it yet"
    answer({"name": name, **change.to_json()}, f"{done}: {said}. It is at revision {change.revision}.", quiet=name)


def _fields(entry: MemoryEntry) -> dict[str, Any]:
    shown = entry.to_json()
    return {field: shown[field] for field in _FIELDS if shown[field] not in (None, "")}


def _as_lines(entries: Iterator[MemoryEntry]) -> Iterator[str]:
    for entry in entries:
        yield json.dumps(_fields(entry), ensure_ascii=False) + "\n"


def _as_array(entries: Iterator[MemoryEntry]) -> Iterator[str]:
    before = "[\n"
    for entry in entries:
        yield before + json.dumps(_fields(entry), ensure_ascii=False)
        before = ",\n"
    yield "\n]\n" if before.startswith(",") else "[]\n"


def _as_table(entries: Iterator[MemoryEntry]) -> Iterator[str]:
    # A writer that hands each line on: what it is given may be long.
    line: list[str] = []
    writer = csv.writer(_Lines(line), lineterminator="\n")
    writer.writerow(_FIELDS)
    yield line.pop()
    for entry in entries:
        fields = _fields(entry)
        writer.writerow([fields.get(field, "") for field in _FIELDS])
        yield line.pop()


def _as_text(entries: Iterator[MemoryEntry]) -> Iterator[str]:
    for entry in entries:
        yield f"{entry.wording or entry.text}\n"


class _Lines:
    """What `csv` writes to."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def write(self, line: str) -> int:
        self._lines.append(line)
        return len(line)


_WRITTEN = {".jsonl": _as_lines, ".json": _as_array, ".csv": _as_table, ".txt": _as_text}
