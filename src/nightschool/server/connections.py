"""How many connections there may be, and how long one may stay without asking or reading anything."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from collections import OrderedDict
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("nightschool.server.connections")

_MOST_DESCRIPTORS = 65_536
# Files of models, databases, logs and uploads need descriptors too.
_OTHER_DESCRIPTORS = 256
# Less than this in `write_seconds` is no reading: single bytes would keep a connection for hours.
_LEAST_READ_BYTES = 16_384


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
        most_per_address: Of them, those of one address.
        idle_seconds: How long a connection may stay without a whole head of a request.
        write_seconds: How long a client may take for each `_LEAST_READ_BYTES` of its answer.
    """

    def __init__(self, most: int, most_per_address: int, idle_seconds: float, write_seconds: float) -> None:
        descriptors = raise_descriptor_limit()
        self.most = min(most, max(descriptors - _OTHER_DESCRIPTORS, descriptors // 2))
        self.most_per_address = most_per_address
        self.idle_seconds = idle_seconds
        self.write_seconds = write_seconds
        self.idle: OrderedDict[BoundedProtocol, asyncio.TimerHandle] = OrderedDict()
        self.by_address: dict[str, set[BoundedProtocol]] = {}

    def protocol(self) -> Any:
        """What uvicorn makes of every connection that it accepts."""
        return partial(BoundedProtocol, limits=self)


class BoundedProtocol(H11Protocol):
    """Uvicorn's protocol, which by itself waits for ever: for a request, after every byte of it, and for a reader.

    When there are too many connections, the one that has waited longest for a request makes room: whoever only holds
    connections open shuts out himself. One whose request is being answered is never closed for another.
    """

    def __init__(self, *args: Any, limits: Connections, **more: Any) -> None:
        super().__init__(*args, **more)
        self._limits = limits
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        super().connection_made(transport)
        limits, address = self._limits, self._address
        same = limits.by_address.setdefault(address, set())
        same.add(self)
        self._note_idleness()
        if len(same) > limits.most_per_address:
            self._make_room(
                [other for other in limits.idle if other in same],
                f"{limits.most_per_address} connections of one address are open (--max-connections-per-address)",
            )
        elif len(self.connections) > limits.most:
            self._make_room(list(limits.idle), f"{limits.most} connections are open (--max-connections)")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note_idleness()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_idleness()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_watching()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()
        self._stop_watching()

    def end(self) -> None:
        """Close the connection at once."""
        self._forget()
        self.transport.abort()

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _make_room(self, idle: list[BoundedProtocol], why: str) -> None:
        """End the longest idle connection; one that has just come, if it is the only one, is told why."""
        log.warning("too many connections", extra={"facts": {"client": self._address, "why": why}})
        if idle[0] is not self:
            idle[0].end()
            return
        self._forget()
        body = json.dumps({"detail": f"{why}. Close some, or come again later."}).encode()
        head = f"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: {len(body)}"
        self.transport.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        self.transport.close()

    def _note_idleness(self) -> None:
        """Start the clock when no request is being answered; single bytes do not set it back."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing():
            self._stop_idling()
            self._watch_reader()  # what is still to be read keeps a closing connection open
        elif is_answering:
            self._stop_idling()
        elif self not in self._limits.idle:
            self._limits.idle[self] = self.loop.call_later(self._limits.idle_seconds, self.end)

    def _stop_idling(self) -> None:
        timer = self._limits.idle.pop(self, None)
        if timer is not None:
            timer.cancel()

    def _forget(self) -> None:
        """Count this connection no more."""
        self._stop_idling()
        self.connections.discard(self)
        same = self._limits.by_address.get(self._address, set())
        same.discard(self)
        if not same:
            self._limits.by_address.pop(self._address, None)

    def _watch_reader(self) -> None:
        """End the connection unless its client goes on reading what is written."""
        if self._writing is None:
            self._look_again(self.transport.get_write_buffer_size())

    def _look_again(self, unread_bytes: int) -> None:
        self._writing = self.loop.call_later(self._limits.write_seconds, self._look, unread_bytes)

    def _look(self, unread_before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread > unread_before - _LEAST_READ_BYTES:
            log.warning("a client does not read its answer", extra={"facts": {"client": self._address}})
            self.end()
        else:
            self._look_again(unread)

    def _stop_watching(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
