"""Adapters that have left their engine and may come back: kept in host memory until others need the room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

from torch import Tensor

from nightschool.models.unmerged import LoraWeights, UnmergedAdapter


class HostTier:
    """The adapters that were used last, by the reference of their version. May be used from any thread.

    On a GPU they are copied into pinned host memory. On a CPU device and host are the same memory: what has gone then is the
    form that the kernel reads, and with it the place in the engine; the factors stay here.

    Args:
        most_bytes: Of all of them together; over it, the one that left its engine longest ago goes.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._adapters: OrderedDict[str, tuple[UnmergedAdapter, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._num_bytes = self._num_evicted = 0

    def put(self, adapter: UnmergedAdapter) -> None:
        """Keep what has left its engine, if there is room for it at all."""
        num_bytes = adapter.weights.num_bytes
        if num_bytes > self._most_bytes:
            return
        weights = LoraWeights(
            {name: (_on_host(down), _on_host(up)) for name, (down, up) in adapter.weights.factors.items()}
        )
        self.take(adapter.ref)
        with self._lock:
            self._adapters[adapter.ref] = replace(adapter, weights=weights), num_bytes
            self._num_bytes += num_bytes
            while self._num_bytes > self._most_bytes:
                _, (_, gone) = self._adapters.popitem(last=False)
                self._num_bytes -= gone
                self._num_evicted += 1

    def take(self, ref: str) -> UnmergedAdapter | None:
        """An adapter, which is not kept here any longer: its engine has it again. None if it is not here."""
        with self._lock:
            found = self._adapters.pop(ref, None)
            if found is None:
                return None
            self._num_bytes -= found[1]
            return found[0]

    def load(self) -> tuple[int, int, int]:
        """How many adapters are here, their bytes, and how many have had to go."""
        with self._lock:
            return len(self._adapters), self._num_bytes, self._num_evicted


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor
