"""The store of an explicit memory: one SQLite file that holds every version of every entry.

    with MemoryStore.open(memory_path(home, "facts")) as store:
        store.add([NewEntry("Ada lives in Oslo.", source="chat_88")], author="ada")
        list(store.entries(at=store.revision))
        store.edit("m1", author="ada", value="Rome")
        store.undo(author="ada")

What supersedes what is decided by the normalised subject and relation alone (`writing.py`), never by likeness.
"""

from nightschool.memory.store.check import Finding, Report
from nightschool.memory.store.conflicts import Contradiction
from nightschool.memory.store.edits import KEEP, Keep
from nightschool.memory.store.memory_store import MemoryStore
from nightschool.memory.store.purge import Purge
from nightschool.memory.store.relations import Cardinality
from nightschool.memory.store.versions import Difference, NamedVersion

__all__ = [
    "KEEP", "Cardinality", "Contradiction", "Difference", "Finding", "Keep", "MemoryStore", "NamedVersion", "Purge", "Report",
]  # fmt: skip
