"""Which versions learned what a memory no longer says: adapters and models that were trained on an old value.

Nothing is marked in them: what is stale is told from the memory and from the data of the runs as they are, so that a value
that comes back makes nobody stale, and a version that learned the old value later than the edit does not slip through.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

from nightschool.data.example import Example
from nightschool.errors import NightschoolError, NotFound
from nightschool.feedback.erasure import taint, tainted_by_entries, versions_that_learned
from nightschool.feedback.word_lines import WordLines
from nightschool.memory.entry import MemoryEntry
from nightschool.memory.facts import key_of
from nightschool.memory.store import MemoryStore
from nightschool.memory.store.purge import Purge
from nightschool.store.home import Home
from nightschool.store.names import full_name, home_of, is_name, split_name
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore

log = logging.getLogger("nightschool.memory")

_WORD = re.compile(r"\w+")
# More statements than these are looked for in one pass over all lines.
_MOST_LOOKED_FOR = 16


@dataclass(frozen=True)
class Stale:
    """Versions of the memory's tenant that learned a statement which holds no longer, or grew from one that did."""

    entry: MemoryEntry
    versions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        one = self.entry
        return {"id": one.id, "text": one.text, "ended": one.died, "versions": list(self.versions)}


@dataclass(frozen=True)
class StaleFact:
    """A statement that a version learned, and that its memory no longer makes."""

    memory: str
    entry: MemoryEntry

    def to_json(self) -> dict[str, Any]:
        return {"memory": self.memory, "id": self.entry.id, "text": self.entry.text, "ended": self.entry.died}


def stale_versions(home: Home, name: str, store: MemoryStore, *, since: int = 0) -> list[Stale]:
    """What versions learned of the statements that ended after a revision. Reads the data of all runs of the tenant.

    Args:
        home: Where the runs and versions are.
        name: The memory's name; versions of its tenant are looked at.
        store: The memory.
        since: Only statements that ended after this revision; 0 looks at all.
    """
    tenant, _ = split_name(name)
    sieve = _Sieve([Statement(entry) for entry in ended_statements(store, since=since)])
    if sieve:
        versions_that_learned(home, tenant, sieve)
    found = ((one.entry, versions_that_learned(home, tenant, one)) for one in sieve.taught)
    return [Stale(entry, tuple(versions)) for entry, versions in found if versions]


@dataclass(frozen=True)
class Learned:
    """Versions of the memory's tenant that learned something that an entry says or said, or grew from one that did."""

    entry: str
    versions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.entry, "versions": list(self.versions)}


def versions_that_learned_entries(home: Home, name: str, store: MemoryStore, entries: Iterable[str]) -> list[Learned]:
    """What versions learned of anything that entries ever said. Reads the data of all runs of the tenant.

    It is to be asked before a purge, after which nothing can tell it. What is not there, or was purged, is left out.

    Args:
        home: Where the runs and versions are.
        name: The memory's name; versions of its tenant are looked at.
        store: The memory.
        entries: Ids of entries, ended ones too.
    """
    tenant, _ = split_name(name)
    sieve = _Sieve([Statement(row) for entry in dict.fromkeys(entries) for row in _past(store, entry)])
    if sieve:
        versions_that_learned(home, tenant, sieve)
    found: dict[str, set[str]] = {}
    for one in sieve.taught:
        found.setdefault(one.entry.id, set()).update(versions_that_learned(home, tenant, one))
    return [Learned(entry, tuple(sorted(versions))) for entry, versions in found.items() if versions]


@dataclass(frozen=True)
class LearnedForGood:
    """Versions that learned an entry which was purged since: what it said, nothing tells any more."""

    entry: str
    versions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.entry, "text": None, "ended": None, "versions": list(self.versions)}


def purge(
    home: Home, name: str, store: MemoryStore, entries: Sequence[str], *, author: str
) -> tuple[Purge, list[Learned]]:
    """Delete entries of a memory for good, and mark the versions of its tenant that learned them, which nothing can tell afterwards.

    They are tainted as by a deleted conversation, by the memory's name and the entry's id; nothing of what it said is kept.

    Raises:
        NotFound, Locked: As `MemoryStore.purge` does.
    """
    for entry in entries:
        if not store.is_purged(entry):
            store.history(entry)
    memory = split_name(name)[1]
    learned = versions_that_learned_entries(home, name, store, entries)
    for one in learned:
        taint(home.database, one.versions, f"{memory}/{one.entry}")
    return store.purge(*entries, author=author), learned


def versions_that_learned_purged(home: Home, name: str, store: MemoryStore) -> list[LearnedForGood]:
    """The versions that a purge of the memory marked, and that are still there."""
    tenant, memory = split_name(name)
    marked = tainted_by_entries(home.database, tenant, memory)
    there = {version.ref for one in Registry(home).names(tenant) for version in Registry(home).versions(one)}
    # A memory of the same name may have been made anew since.
    found = {
        entry: tuple(ref for ref in refs if ref in there) for entry, refs in marked.items() if store.is_purged(entry)
    }
    return [LearnedForGood(entry, refs) for entry, refs in found.items() if refs]


class StaleVersions:
    """What each version of a tenant learned that a memory of the tenant no longer says.

    It reads the data of all runs of the tenant, where it has memories, and again only when a memory, a run or a version is another.
    For all threads.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._known: dict[str, tuple[object, dict[str, list[StaleFact]]]] = {}

    def of(self, tenant: str) -> dict[str, list[StaleFact]]:
        """By the reference of the version. A memory that cannot be read is left out, and logged."""
        with self._lock, ExitStack() as open_stores:
            stores = self._stores(tenant, open_stores)
            if not stores:
                return {}
            seen = (_seen(stores), *self._runs_and_versions(tenant))
            known = self._known.get(tenant)
            if known is None or known[0] != seen:
                known = self._known[tenant] = (seen, self._looked_up(stores))
            return known[1]

    def _stores(self, tenant: str, open_stores: ExitStack) -> dict[str, MemoryStore]:
        folder = home_of(self._home, tenant).memories
        names = sorted(path.name for path in folder.iterdir() if is_name(path.name)) if folder.is_dir() else []
        stores = {}
        for name in names:
            try:
                stores[full_name(tenant, name)] = open_stores.enter_context(MemoryStore.open(folder / name))
            except NightschoolError as error:
                log.warning("The memory %s is left out of what is stale: %s", full_name(tenant, name), error)
        return stores

    def _runs_and_versions(self, tenant: str) -> tuple[object, object]:
        registry = Registry(self._home)
        refs = [version.ref for name in registry.names(tenant) for version in registry.versions(name)]
        # A folder changes when a file in it is written anew, as deleting a conversation does.
        return [(run.id, run.path.stat().st_mtime_ns) for run in RunStore(self._home).ls(tenant)], refs

    def _looked_up(self, stores: dict[str, MemoryStore]) -> dict[str, list[StaleFact]]:
        found: dict[str, list[StaleFact]] = {}
        for name, store in stores.items():
            for one in stale_versions(self._home, name, store):
                for ref in one.versions:
                    found.setdefault(ref, []).append(StaleFact(name, one.entry))
        return found


def _seen(stores: dict[str, MemoryStore]) -> list[tuple[str, str, int]]:
    """What tells these memories, as they are, from what they were."""
    return [(name, store.identity, store.revision) for name, store in stores.items()]


def ended_statements(store: MemoryStore, *, since: int = 0) -> list[MemoryEntry]:
    """The statements that ended after a revision and that no living entry makes, each once, oldest first."""
    ended = [change.row for change in store.changes_since(since) if change.kind == "died"]
    statements: dict[tuple[object, ...], MemoryEntry] = {}
    for entry in store.rows(ended):
        if entry is not None and not _is_said(store, entry):
            statements[_statement(entry)] = entry
    return sorted(statements.values(), key=lambda entry: entry.row)


class Statement:
    """A statement that is looked for in examples: its subject anywhere, and its value in what the example teaches to say."""

    def __init__(self, entry: MemoryEntry) -> None:
        self.entry = entry
        self._about = _words(entry.subject or "")
        self._value = _words(entry.value or entry.text)
        self.first_word = (self._about.split() or self._value.split() or [""])[0]
        self._lines = WordLines((self._about + self._value).split())

    def candidates(self, content: bytes) -> Iterable[bytes]:
        """The lines of JSON that may teach the statement."""
        return self._lines.of(content)

    def is_in(self, example: Example) -> bool:
        """Whether whoever learns the example learns the statement."""
        if example.messages:
            said = [message.content for message in example.messages if message.role == "assistant" and message.weight]
            shown = [message.content for message in example.messages]
        else:
            said = shown = [example.text or ""]
        return _holds(said, self._value) and _holds(shown, self._about)


class _Sieve:
    """Many statements, looked for in one pass over the data: those whose first word an example has. `taught` are found."""

    def __init__(self, statements: list[Statement]) -> None:
        self._by_word: dict[str, list[Statement]] = {}
        for one in statements:
            self._by_word.setdefault(one.first_word, []).append(one)
        self._taught: dict[int, Statement] = {}

    def __bool__(self) -> bool:
        return bool(self._by_word)

    @property
    def taught(self) -> list[Statement]:
        """The statements that an example teaches, in the order of their rows."""
        return [self._taught[row] for row in sorted(self._taught)]

    def candidates(self, content: bytes) -> Iterable[bytes]:
        """The lines of JSON that may teach one of the statements; all lines where these are many."""
        statements = [one for own in self._by_word.values() for one in own]
        if len(statements) > _MOST_LOOKED_FOR:
            return content.splitlines()
        return chain.from_iterable(one.candidates(content) for one in statements)

    def is_in(self, example: Example) -> bool:
        """Never: each example is to be looked at."""
        shown = [message.content for message in example.messages] or [example.text or ""]
        for word in set(_words(" ".join(shown)).split()) & self._by_word.keys():
            self._taught |= {one.entry.row: one for one in self._by_word[word] if one.is_in(example)}
        return False


def _holds(texts: Iterable[str], words: str) -> bool:
    return words in _words(" \n ".join(texts))


def _words(text: str) -> str:
    """The words of a text between spaces, so that one text can be looked for in another."""
    return f" {' '.join(_WORD.findall(text.casefold()))} " if text else " "


def _past(store: MemoryStore, entry: str) -> list[MemoryEntry]:
    try:
        return store.history(entry)
    except NotFound:
        return []


def _statement(entry: MemoryEntry) -> tuple[object, ...]:
    if entry.value is None:
        return (key_of(entry.text),)
    return entry.subject_key, entry.relation_key, key_of(entry.value)


def _is_said(store: MemoryStore, entry: MemoryEntry) -> bool:
    if entry.subject is None or entry.relation is None:
        return any(one.died is None and key_of(one.text) == key_of(entry.text) for one in store.history(entry.id))
    return any(_statement(one) == _statement(entry) for one in store.about(entry.subject, entry.relation))
