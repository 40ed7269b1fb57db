"""How many connections there may be, and how long one may stay without asking anything."""

from __future__ import annotations

import asyncio
import resource
from collections import OrderedDict
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_MOST_DESCRIPTORS = 65_536
# Files of models, databases, logs and uploads need descriptors too.
_OTHER_DESCRIPTORS = 256


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files as far as this process may; many shells start with 1,024. Returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return allowed
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


class Connections:
    """The bounds that all connections of one server share.

    Args:
        most: Connections at once; fewer where the process may not open as many files.
        idle_seconds: How long a connection may stay without a whole head of a request.
    """

    def __init__(self, most: int, idle_seconds: float) -> None:
        descriptors = raise_descriptor_limit()
        self.most = min(most, max(descriptors - _OTHER_DESCRIPTORS, descriptors // 2))
        self.idle_seconds = idle_seconds
        self.idle: OrderedDict[BoundedProtocol, asyncio.TimerHandle] = OrderedDict()

    def protocol(self) -> Any:
        """What uvicorn makes of every connection that it accepts."""
        return partial(BoundedProtocol, limits=self)


class BoundedProtocol(H11Protocol):
    """Uvicorn's protocol, which by itself waits for a first request for ever, and again after every byte of it.

    When there are too many connections, the one that has waited longest for a request makes room: whoever only holds
    connections open shuts out himself. One whose request is being answered is never closed for another.
    """

    def __init__(self, *args: Any, limits: Connections, **more: Any) -> None:
        super().__init__(*args, **more)
        self._limits = limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        super().connection_made(transport)
        self._note_idleness()
        if len(self.connections) > self._limits.most:
            longest = next(iter(self._limits.idle))
            longest.end()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note_idleness()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_idleness()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def end(self) -> None:
        """Close the connection at once."""
        self._forget()
        self.connections.discard(self)
        self.transport.abort()

    def _note_idleness(self) -> None:
        """Start the clock when no request is being answered; single bytes do not set it back."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.transport.is_closing():
            self._forget()
        elif self not in self._limits.idle:
            self._limits.idle[self] = self.loop.call_later(self._limits.idle_seconds, self.end)

    def _forget(self) -> None:
        timer = self._limits.idle.pop(self, None)
        if timer is not None:
            timer.cancel()
