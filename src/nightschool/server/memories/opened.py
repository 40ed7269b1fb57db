"""The memories that a server has open."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from nightschool.engine.memory_lookup import open_memory
from nightschool.engine.pool import BoundEngine
from nightschool.memory.memory import Memory
from nightschool.memory.store import MemoryStore
from nightschool.store.home import Home
from nightschool.store.names import full_name, home_of, is_name, memory_path

_MOST_OPEN = 64


class Memories:
    """The stores of a home's memories, opened when they are first asked for. All methods may block.

    Args:
        home: Where the memories lie.
        most_open: Over it, the one that was asked for longest ago gives its connections back; its next use makes new ones.
    """

    def __init__(self, home: Home, most_open: int = _MOST_OPEN) -> None:
        self._home = home
        self._most_open = most_open
        self._stores: OrderedDict[str, MemoryStore] = OrderedDict()
        self._asked: OrderedDict[tuple[str, str], Memory] = OrderedDict()
        self._opening = threading.Lock()
        self._lock = threading.Lock()

    def names(self, tenant: str) -> list[str]:
        """What a tenant's memories are called, without the tenant."""
        folder = home_of(self._home, tenant).memories
        return sorted(path.name for path in folder.iterdir() if is_name(path.name)) if folder.is_dir() else []

    def create(self, tenant: str, name: str) -> MemoryStore:
        """Make an empty memory. Raises Conflict if there is one of that name."""
        return self._kept(full_name(tenant, name), MemoryStore.create)

    def store(self, tenant: str, name: str) -> MemoryStore:
        """A memory of a tenant. Raises NotFound if it has none of that name."""
        key = full_name(tenant, name)
        with self._lock:
            store = self._stores.get(key)
            if store is not None:
                self._stores.move_to_end(key)
        return store or self._kept(key, MemoryStore.open)

    def asked(self, tenant: str, name: str, generation: BoundEngine) -> Memory:
        """A memory of a tenant as a model asks it: with the tokens, and by the embeddings, of the model's base.

        The first time its index is opened, or made if there is none, while others wait.

        Raises:
            NotFound: If the tenant has no memory of that name.
            ModelError: If the model's tokenizer cannot be read apart from it.
        """
        key = (full_name(tenant, name), generation.binding.label)
        with self._lock:
            memory = self._asked.get(key)
            if memory is not None:
                self._asked.move_to_end(key)
                return memory
        with self._opening:
            with self._lock:
                memory = self._asked.get(key)
            if memory is None:
                memory = self._opened(key, generation)
        return memory

    def _opened(self, key: tuple[str, str], generation: BoundEngine) -> Memory:
        memory = open_memory(memory_path(self._home, key[0]), generation)
        with self._lock:
            self._asked[key] = memory
            idle = [self._asked.popitem(last=False)[1] for _ in range(len(self._asked) - self._most_open)]
        for one in idle:
            one.close()
        return memory

    def close(self) -> None:
        """Give all connections back."""
        with self._lock:
            opened: list[MemoryStore | Memory] = [*self._stores.values(), *self._asked.values()]
            self._stores, self._asked = OrderedDict(), OrderedDict()
        for one in opened:
            one.close()

    def _kept(self, key: str, made: Callable[[Path], MemoryStore]) -> MemoryStore:
        store = made(memory_path(self._home, key))
        with self._lock:
            store = self._stores.setdefault(key, store)
            idle = [self._stores.popitem(last=False)[1] for _ in range(len(self._stores) - self._most_open)]
        for one in idle:
            one.close()
        return store
