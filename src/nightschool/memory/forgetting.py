"""Deleting a conversation with all that came from it, the entries of memories among it.

An entry tells by its source which conversation it came from. It is purged: no revision and no byte of the file has it any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nightschool.feedback.conversations import Conversation
from nightschool.feedback.erasure import Traces, erase, traces_of
from nightschool.memory.staleness import purge
from nightschool.memory.store import MemoryStore
from nightschool.memory.store.connection import FILE_NAME
from nightschool.store.home import Home
from nightschool.store.names import full_name, home_of, is_name, memory_path, split_name


def traces_with_entries(home: Home, conversation: Conversation, *, by_content: bool = True) -> Traces:
    """As `traces_of`, and which entries of its tenant's memories came from it."""
    return replace(
        traces_of(home, conversation, by_content=by_content),
        memories=_entries_from(home, split_name(conversation.model)[0], conversation.request_id),
    )


def forget_conversation(
    home: Home,
    request_id: str,
    *,
    author: str,
    owner: str | None = None,
    tenant: str | None = None,
    by_content: bool = True,
) -> tuple[Traces, int]:
    """As `erase`, and purge what memories of its tenant have from it; versions that learned such an entry are tainted.

    What an entry says by now from another source stays, as an entry of its own.

    Raises:
        NotFound, Conflict: As `erase`.
        Locked: If another process reads a memory that has an entry from it; then the conversation is still there.
    """
    purged: list[str] = []

    def purge_entries(traces: Traces) -> None:
        for memory, store in _memories(home, traces.tenant):
            if entries := store.entries_from(request_id):
                purged.extend(f"{memory}/{entry}" for entry in entries)
                store.set_apart(entries, request_id, author=author)
                purge(home, full_name(traces.tenant, memory), store, entries, author=author)
            else:
                store.finish_purge()

    traces, replayed = erase(home, request_id, owner=owner, tenant=tenant, by_content=by_content, besides=purge_entries)
    return replace(traces, memories=tuple(purged)), replayed


def _entries_from(home: Home, tenant: str, source: str) -> tuple[str, ...]:
    return tuple(
        f"{memory}/{entry}" for memory, store in _memories(home, tenant) for entry in store.entries_from(source)
    )


def _memories(home: Home, tenant: str) -> Iterator[tuple[str, MemoryStore]]:
    """The memories of a tenant, each open until the next one is asked for."""
    folder = home_of(home, tenant).memories
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_name(path.name) and (path / FILE_NAME).is_file():
            with MemoryStore.open(memory_path(home, full_name(tenant, path.name))) as store:
                yield path.name, store
