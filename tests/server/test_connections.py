"""Connections that ask nothing: they are bounded, they end, and they shut nobody out."""

import json
import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from nightschool.server.connections import Connections, raise_descriptor_limit
from nightschool.server.logs import Throttle
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import LiveServer, eventually, live, server_log


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


def test_one_address_shuts_out_itself_alone():
    with live(FakeSlot(), max_connections=100, max_connections_per_address=4) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(10)]
        other = socket.create_connection(("127.0.0.1", server.port), timeout=20, source_address=("127.0.0.2", 0))
        assert all(ended(connection) for connection in held[:6]), "the longest idle ones of that address made room"
        assert get_healthz(other).startswith(b"HTTP/1.1 200"), "another address is not counted"
        assert get_healthz(held[-1]).startswith(b"HTTP/1.1 200")
        for connection in (*held, other):
            connection.close()


def test_an_address_whose_connections_are_all_being_answered_is_told_which_option_is_meant():
    slot = FakeSlot(answer=lambda prompt: "x" * 40, seconds_per_token=0.02)
    with live(slot, max_connections_per_address=1) as server, server_log() as log:
        eventually(lambda: not server.server.server_state.connections)
        body = {"model": "bot", "prompt": "a", "max_tokens": 40, "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as late:
                said = b"".join(iter(lambda: late.recv(4096), b""))
            assert list(lines)[-2] == "data: [DONE]"
    assert said.startswith(b"HTTP/1.1 429 ")
    assert b"--max-connections-per-address" in said
    (line,) = (row for row in log.rows if row["message"] == "too many connections")
    assert line["client"] == "127.0.0.1"
    assert "--max-connections-per-address" in line["why"]


def get_healthz(connection: socket.socket) -> bytes:
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    return connection.recv(4096)


@contextmanager
def narrow(server: LiveServer) -> Iterator[socket.socket]:
    """A connection into which little fits that its client does not read."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", server.port))
        yield connection


def is_paused(server: LiveServer) -> bool:
    return any(one.flow.write_paused for one in list(server.server.server_state.connections))


def post_a_long_stream(connection: socket.socket) -> None:
    turns = [{"role": "user", "content": "a"}]
    body = {"model": "bot", "messages": turns, "max_tokens": 2500, "stream": True, "logprobs": True, "top_logprobs": 20}
    sent = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)


def test_a_stream_that_nobody_reads_ends_and_its_answer_is_cancelled():
    slot = FakeSlot(answer=lambda prompt: "x" * 2500)
    with live(slot, write_timeout_seconds=0.2) as server, narrow(server) as connection:
        post_a_long_stream(connection)
        eventually(lambda: slot.current.engine.handles)
        (handle,) = slot.current.engine.handles
        eventually(lambda: not server.server.server_state.connections)
        eventually(lambda: handle.cancelled)
        assert not handle.is_finished


def test_a_connection_that_is_being_closed_ends_though_nobody_reads_the_rest():
    with live(FakeSlot(), write_timeout_seconds=0.2, idle_timeout_seconds=600) as server, narrow(server) as connection:
        request = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        state = server.server.server_state
        port = connection.getsockname()[1]
        served = eventually(lambda: next((one for one in list(state.connections) if one.client[1] == port), None))
        for _ in range(10_000):  # until the system holds no more, and the server has to
            before = state.total_requests
            connection.sendall(request + b"\r\n")
            eventually(lambda before=before: state.total_requests > before)
            if served.transport.get_write_buffer_size():
                break
        assert served.transport.get_write_buffer_size() > 0
        assert not is_paused(server)
        connection.sendall(request + b"Connection: close\r\n\r\n")
        eventually(lambda: not state.connections)


def test_a_client_that_pauses_and_goes_on_reading_gets_everything():
    slot = FakeSlot(answer=lambda prompt: "x" * 2500)
    with live(slot) as server, narrow(server) as connection:
        post_a_long_stream(connection)
        eventually(lambda: is_paused(server))
        answer = b""
        while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            answer += connection.recv(1 << 16)
        assert get_healthz(connection).startswith(b"HTTP/1.1 200"), "the connection goes on"


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
        assert Connections(10**9, 512, 1, 1).most < soft
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
