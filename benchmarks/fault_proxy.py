"""An HTTP proxy in front of an object store that drops, stalls, cuts and corrupts, and remembers what it did.

Faults hit whole requests: their headers stay as they are, because with TLS nobody between can alter those either.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import unquote

FAULTS = ("refuse", "cut", "stall", "corrupt", "lose_answer", "cut_answer")
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Exchange:
    """One request: what it was, what was done to it, and what the store answered (None: nothing reached the client)."""

    method: str
    target: str
    body_bytes: int
    fault: str | None
    status: int | None

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def stored(self) -> bool:
        """Whether an object, or a part of one, arrived as it was sent and the client was told."""
        return self.method in ("PUT", "POST") and self.status in (200, 201) and self.fault is None


class FaultProxy:
    """Listens on `url`; passes on to a server on this machine. `share` of the requests are hit by a fault."""

    def __init__(self, port: int, *, share: float, seed: int = 0, stall_seconds: float = 4.0) -> None:
        self._target = ("127.0.0.1", port)
        self._share = share
        self._random = random.Random(seed)
        self._stall_seconds = stall_seconds
        self._guard = threading.Lock()
        self.exchanges: list[Exchange] = []
        self.on_exchange: Callable[[Exchange], None] = lambda _: None
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._share = 0.0
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError, _Over):
            stream = _Stream(client)
            while True:
                head = stream.head()
                method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
                fault = self._draw()
                exchange = Exchange(method, target, _length(head), fault, None)
                try:
                    status, keep = self._pass_on(client, stream, head, exchange, fault)
                    exchange = Exchange(method, target, exchange.body_bytes, fault, status)
                finally:
                    with self._guard:
                        self.exchanges.append(exchange)
                    self.on_exchange(exchange)
                if not keep:
                    return

    def _draw(self) -> str | None:
        with self._guard:
            return self._random.choice(FAULTS) if self._random.random() < self._share else None

    def _pass_on(
        self, client: socket.socket, stream: _Stream, head: bytes, exchange: Exchange, fault: str | None
    ) -> tuple[int | None, bool]:
        """Pass one request on and its answer back. Returns the status that the client saw, and whether it may go on."""
        if fault == "refuse":
            return None, False
        where = self._random.randrange(max(1, exchange.body_bytes))
        with socket.create_connection(self._target, timeout=60) as server:
            server.sendall(head)
            passed = 0
            for piece in stream.body(exchange.body_bytes):
                here = where - passed
                if fault in ("cut", "stall") and here < len(piece):
                    server.sendall(piece[: max(0, here)])
                    if fault == "stall":
                        time.sleep(self._stall_seconds)
                    return None, False
                if fault == "corrupt" and 0 <= here < len(piece):
                    piece = piece[:here] + bytes([piece[here] ^ 0x10]) + piece[here + 1 :]
                server.sendall(piece)
                passed += len(piece)
            answer = _Stream(server)
            answer_head = answer.head()
            status = int(answer_head.split(b" ", 2)[1])
            if fault == "lose_answer":
                for _ in _answer_body(answer, answer_head, exchange.method, status):
                    continue  # the server has done its part
                return None, False
            client.sendall(answer_head if fault != "cut_answer" else answer_head[: len(answer_head) // 2])
            if fault == "cut_answer":
                return None, False
            for piece in _answer_body(answer, answer_head, exchange.method, status):
                client.sendall(piece)
            close = b"connection: close" in answer_head.lower() or _unknown_length(answer_head)
            return status, not close


class _Over(Exception):
    """The other end closed the connection."""


class _Stream:
    """A socket, read by heads and bodies."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def head(self) -> bytes:
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, self._rest = self._rest.split(b"\r\n\r\n", 1)
        return head + b"\r\n\r\n"

    def body(self, num_bytes: int) -> Iterator[bytes]:
        while num_bytes:
            if not self._rest:
                self._more()
            piece, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
            num_bytes -= len(piece)
            yield piece

    def to_end(self) -> Iterator[bytes]:
        with suppress(_Over):
            while True:
                if self._rest:
                    piece, self._rest = self._rest, b""
                    yield piece
                self._more()

    def _more(self) -> None:
        received = self._connection.recv(_CHUNK_BYTES)
        if not received:
            raise _Over
        self._rest += received


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return None


def _length(head: bytes) -> int:
    return int(_header(head, b"content-length") or 0)


def _unknown_length(head: bytes) -> bool:
    return _header(head, b"content-length") is None


def _answer_body(answer: _Stream, head: bytes, method: str, status: int) -> Iterator[bytes]:
    if method == "HEAD" or status in (204, 304) or status < 200:
        return iter(())
    return answer.to_end() if _unknown_length(head) else answer.body(_length(head))


@contextmanager
def fault_proxy(port: int, *, share: float, seed: int = 0, stall_seconds: float = 4.0) -> Iterator[FaultProxy]:
    """A proxy for the time of the block."""
    proxy = FaultProxy(port, share=share, seed=seed, stall_seconds=stall_seconds)
    try:
        yield proxy
    finally:
        proxy.close()
