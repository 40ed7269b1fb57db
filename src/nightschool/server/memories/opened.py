"""The memories that a server has open."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from nightschool.engine.memory_lookup import forget_entries, open_memory
from nightschool.engine.pool import BoundEngine
from nightschool.errors import NotFound
from nightschool.memory.entry import Change
from nightschool.memory.layers import Layer, Layers, check_overlays, search_words
from nightschool.memory.memory import Memory
from nightschool.memory.staleness import Stale, StaleVersions, purge, stale_versions
from nightschool.memory.store import MemoryStore
from nightschool.memory.store.connection import FILE_NAME
from nightschool.store.home import Home
from nightschool.store.names import full_name, home_of, is_name, memory_path, split_name, tenants_of
from nightschool.store.principal import DEFAULT_TENANT

_MOST_OPEN = 64
_SHARED = "shared:"


class Memories:
    """The stores of a home's memories, opened when they are first asked for. All methods may block.

    A memory that was deleted, or made anew under its name, is never answered from what is still open of the old one.

    Args:
        home: Where the memories lie.
        shared: Names of memories of the home itself that every tenant reads, beneath its own of that name.
        most_open: Over it, the one that was asked for longest ago gives its connections back; its next use makes new ones.
    """

    def __init__(self, home: Home, shared: Collection[str] = (), most_open: int = _MOST_OPEN) -> None:
        self._home, self._shared = home, frozenset(shared)
        self.stale_versions = StaleVersions(home)
        self._stores: _Recent[MemoryStore] = _Recent(most_open)
        self._asked: _Recent[Memory] = _Recent(most_open)

    def names(self, tenant: str) -> list[str]:
        """What a tenant's memories are called, without the tenant."""
        folder = home_of(self._home, tenant).memories
        return sorted(path.name for path in folder.iterdir() if is_name(path.name)) if folder.is_dir() else []

    def shared_names(self, tenant: str) -> list[str]:
        """The memories of the home itself that are there and that a tenant reads beneath its own; none for whoever owns them."""
        if tenant == DEFAULT_TENANT:
            return []
        return sorted(name for name in self._shared if _file_of(memory_path(self._home, name)) is not None)

    def owners(self, name: str) -> list[str]:
        """The tenants that have a memory of that name."""
        of_tenants = ((tenant, memory_path(self._home, full_name(tenant, name))) for tenant in tenants_of(self._home))
        return [tenant for tenant, folder in of_tenants if _file_of(folder) is not None]

    def create(self, tenant: str, name: str) -> MemoryStore:
        """Make an empty memory. Raises Conflict if there is one of that name."""
        folder = memory_path(self._home, full_name(tenant, name))
        MemoryStore.create(folder).close()
        return self.store(tenant, name)

    def store(self, tenant: str, name: str) -> MemoryStore:
        """A memory of a tenant. Raises NotFound if it has none of that name."""
        folder = memory_path(self._home, full_name(tenant, name))
        file = _file_of(folder)
        if file is None:
            raise _none_of(name)
        return self._stores.get((folder, file, ""), lambda: MemoryStore.open(folder))

    def made_stale(self, tenant: str, name: str, store: MemoryStore, change: Change) -> list[Stale]:
        """What versions of the tenant learned of the statements that a write ended. Reads the data of the tenant's runs."""
        if not (change.superseded or change.removed):
            return []
        return stale_versions(self._home, full_name(tenant, name), store, since=change.revision - 1)

    def purge(self, tenant: str, name: str, store: MemoryStore, entry: str, author: str) -> dict[str, Any]:
        """Delete an entry of a memory of a tenant for good. Returns what was deleted, and which versions of the tenant learned it,
        which are marked as tainted. Engines let go of what they keep of entries.

        Reads the data of the tenant's runs.

        Raises:
            NotFound, Locked: As `MemoryStore.purge` does.
        """
        done, learned = purge(self._home, full_name(tenant, name), store, [entry], author=author)
        # A memory that nobody has open any more would not see it, and what was read of it may still be kept.
        forget_entries()
        return done.to_json() | {"learned": [one.to_json() for one in learned]}

    def layers(self, tenant: str, name: str, overlays: Sequence[str] = ()) -> list[tuple[str, str]]:
        """The memories that a tenant reads under a name, the uppermost first: what each is called there, and its full name.

        Of the `overlays` each lies over those before it.

        Raises:
            NotFound: If the tenant has no memory of that name, and none is shared; or none of an overlay's name.
            UsageError: If a memory is to lie over itself.
        """
        check_overlays(name, overlays)
        found = [(one, full_name(tenant, one)) for one in reversed(overlays)]
        shared = [(f"{_SHARED}{name}", name)] if name in self.shared_names(tenant) else []
        own = full_name(tenant, name)
        if not shared or _file_of(memory_path(self._home, own)) is not None:
            found.append((name, own))
        for label, full in found:
            if _file_of(memory_path(self._home, full)) is None:
                raise _none_of(label)
        return found + shared

    def asked(self, tenant: str, name: str, bound: BoundEngine, overlays: Sequence[str] = ()) -> Layers:
        """A memory of a tenant as a model asks it, with what lies over and beneath it: with the tokens, and by the embeddings, of the
        model's base.

        All adapters on a base ask as the base does; memory modules ask by heads of their own. The first time an index is opened, or
        made if there is none, while others who ask this very memory wait.

        Raises:
            NotFound, UsageError: As `layers` does.
            ModelError: If the model's tokenizer cannot be read apart from it.
        """
        who = bound.binding.base if bound.memory is None else bound.binding.label

        def opened(full: str) -> Memory:
            folder = memory_path(self._home, full)
            return self._asked.get((folder, _file_of(folder), who), lambda: open_memory(folder, bound))

        return Layers(name, [Layer(label, opened(full)) for label, full in self.layers(tenant, name, overlays)])

    def search(self, tenant: str, name: str, query: str, limit: int, overlays: Sequence[str] = ()) -> dict[str, Any]:
        """The entries that hold words of a query, of all memories that a tenant reads under a name; those of the upper ones first.

        Raises:
            NotFound, UsageError: As `layers` does.
        """
        layers = [(label, self.store(*split_name(full))) for label, full in self.layers(tenant, name, overlays)]
        revisions, found = search_words(layers, query, limit)
        return {"revisions": revisions, "entries": [entry.to_json() | {"memory": label} for label, entry in found]}

    def retract(self, tenant: str, store: MemoryStore, of: str, entry: str, author: str) -> Change:
        """Take back, in a memory of a tenant, what an entry of another one says that the tenant reads.

        Args:
            tenant: Whose memories they are.
            store: The memory that is written.
            of: What the other one is called in answers: `shared:NAME`, or the name of a memory of the tenant.
            entry: Its id there.
            author: Who writes.

        Raises:
            NotFound: If there is no such memory, or entry.
            UsageError: If the entry is itself a retraction.
        """
        shared = of.removeprefix(_SHARED)
        if shared != of and shared not in self.shared_names(tenant):
            raise NotFound(
                f"There is no memory {shared!r} that is shared with you. GET /api/memories lists those that are."
            )
        other = self.store(tenant, of) if shared == of else self.store(DEFAULT_TENANT, shared)
        return store.retract((f"{of}/{entry}", other.get(entry)), author=author)

    def close(self) -> None:
        """Give all connections back."""
        self._stores.close()
        self._asked.close()


class _Closes(Protocol):
    def close(self) -> None: ...


Opened = TypeVar("Opened", bound=_Closes)


# The folder, what tells its file from another of the same name, and who asks.
Key = tuple[Path, tuple[int, int] | None, str]


class _Recent(Generic[Opened]):
    """What was opened last, by its key. Each is opened once, whoever else is opened meanwhile."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: OrderedDict[Key, Opened] = OrderedDict()
        self._opening: dict[Key, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Key, make: Callable[[], Opened]) -> Opened:
        with self._lock:
            # A file that is open keeps its number, so that another file of this name has another.
            gone = [self._open.pop(one) for one in list(self._open) if one[0] == key[0] and one[1] != key[1]]
            opening = self._opening.setdefault(key, threading.Lock())
        for one in gone:
            one.close()
        try:
            with opening:
                return self._found_or_made(key, make)
        finally:
            with self._lock:
                self._opening.pop(key, None)

    def _found_or_made(self, key: Key, make: Callable[[], Opened]) -> Opened:
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
                return found
        made = make()
        with self._lock:
            self._open[key] = made
            idle = [self._open.popitem(last=False)[1] for _ in range(len(self._open) - self._most)]
        for one in idle:
            one.close()
        return made

    def close(self) -> None:
        with self._lock:
            opened, self._open = list(self._open.values()), OrderedDict()
        for one in opened:
            one.close()


def _none_of(name: str) -> NotFound:
    # Without the folder: where the home lies is nobody's business over HTTP.
    return NotFound(
        f"There is no memory {name!r}. GET /api/memories lists those that are there; POST /api/memories makes one."
    )


def _file_of(folder: Path) -> tuple[int, int] | None:
    """What tells a memory's file from another of the same name; None if there is none."""
    try:
        found = (folder / FILE_NAME).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
