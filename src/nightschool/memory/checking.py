"""Checking a memory with all that is derived from it."""

from __future__ import annotations

from dataclasses import replace

from nightschool.memory.index.folders import damaged_files
from nightschool.memory.store import MemoryStore
from nightschool.memory.store.check import Finding, Report
from nightschool.memory.store.purge import INDEX_FOLDER
from nightschool.store.atomic import remove_folder


def check_memory(store: MemoryStore) -> Report:
    """Compare all that a memory keeps with its digests, and its indexes with their checksums. Takes time by all that is kept."""
    report = store.check()
    for path in damaged_files(store.folder / INDEX_FOLDER):
        file = path.relative_to(store.folder).as_posix()
        found = f"{file} is not what was written. Whoever asks the memory next makes this index anew."
        report.findings.append(Finding(found, file=file))
    return report


def remove_damaged_indexes(store: MemoryStore, report: Report) -> Report:
    """Remove the indexes that a check found to be damaged; whoever asks the memory next makes them anew. Returns what else it found.

    Raises:
        Locked: If another process is writing one of them.
    """
    for file in {one.file for one in report.findings if one.file is not None}:
        remove_folder((store.folder / file).parent)
    return replace(report, findings=[one for one in report.findings if one.file is None])
