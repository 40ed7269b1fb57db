"""Checking a memory with all that is derived from it."""

from __future__ import annotations

from nightschool.memory.index.folders import damaged_files
from nightschool.memory.store import MemoryStore
from nightschool.memory.store.check import Finding, Report
from nightschool.memory.store.purge import INDEX_FOLDER


def check_memory(store: MemoryStore) -> Report:
    """Compare all that a memory keeps with its digests, and its indexes with their checksums. Takes time by all that is kept."""
    report = store.check()
    for path in damaged_files(store.folder / INDEX_FOLDER):
        found = f"{path.relative_to(store.folder)} is not what was written. Whoever asks the memory next makes this index anew."
        report.findings.append(Finding(found))
    return report
