"""Connections that ask nothing: they are bounded, they end, and they shut nobody out."""

import logging
import resource
import socket

import httpx2
import pytest

from nightschool.server.connections import Connections, raise_descriptor_limit
from nightschool.server.logs import Throttle
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import eventually, live


def ended(connection: socket.socket) -> bool:
    """Whether the server closed a connection that nothing was asked on."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_idle_connections_make_room_for_whoever_asks():
    with live(FakeSlot(), max_connections=8) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(30)]
        for _ in range(3):
            assert httpx2.get(f"{server.url}/healthz").status_code == 200
        assert all(ended(connection) for connection in held[:22]), "the longest idle ones made room"
        eventually(lambda: len(server.server.server_state.connections) <= 8)
        for connection in held:
            connection.close()


def test_a_connection_whose_request_is_being_answered_makes_no_room():
    slot = FakeSlot(answer=lambda prompt: "x" * 40, seconds_per_token=0.02)
    with live(slot, max_connections=2) as server:
        body = {"model": "bot", "prompt": "a", "max_tokens": 40, "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            for _ in range(10):
                socket.create_connection(("127.0.0.1", server.port), timeout=20).close()
            held = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(10)]
            assert list(lines)[-2] == "data: [DONE]"
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    "begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "], ids=["silent", "begun"]
)
def test_a_head_that_does_not_come_ends_the_connection(begun):
    with (
        live(FakeSlot(), idle_timeout_seconds=0.3) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        connection.sendall(begun)
        assert ended(connection)


def test_single_bytes_do_not_keep_a_connection_open():
    with (
        live(FakeSlot(), idle_timeout_seconds=0.5) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=0.05) as connection,
    ):
        sent = 0
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        while sent < 1000:
            try:
                connection.sendall(b"x")
                sent += 1
                if ended(connection):
                    break
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
        assert sent < 1000


def test_an_answer_is_not_bound_by_the_time_a_connection_may_idle():
    slot = FakeSlot(answer=lambda prompt: "x" * 50, seconds_per_token=0.02)
    with live(slot, idle_timeout_seconds=0.3) as server:
        assert httpx2.post(f"{server.url}/generate", json={"query": "a"}).json()["response"] == "x" * 50


def test_the_limit_of_open_files_is_raised_and_bounds_the_connections():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        soft = raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft >= min(before[1], 65_536)
        assert Connections(10**9, 1).most < soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_lines_of_a_library_that_repeat_themselves_are_counted_instead_of_written():
    now = 0.0
    throttle = Throttle(3, lambda: now)

    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord("asyncio", logging.ERROR, "", 0, text, None, None)

    same = "socket.accept() out of system resource"
    assert [throttle.filter(record(f"{same}\nsocket: {number}")) for number in range(100)].count(True) == 3
    assert throttle.filter(record("something else"))
    now = 60.0
    later = record(same)
    assert throttle.filter(later)
    assert later.facts == {"left_out_before": 97}
