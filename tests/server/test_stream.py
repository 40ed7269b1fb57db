"""Clients that go away, over a real socket: the generation behind them is cancelled."""

import json
import socket
import threading

import httpx2
import pytest

from tests.support.fake_slot import FakeSlot
from tests.support.live_server import eventually, live, server_log

CHAT = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def slow_slot():
    return FakeSlot(answer=lambda prompt: "x" * 10_000, seconds_per_token=0.01)


def send(server, path: str, body: dict) -> socket.socket:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_in_the_middle_of_a_stream_cancels_every_answer(slow_slot, n):
    with server_log() as log, live(slow_slot) as server:
        connection = send(server, "/v1/chat/completions", CHAT | {"stream": True, "n": n})
        received = b""
        while b"xx" not in received.replace(b'"content": "x"', b"xx"):
            received += connection.recv(4096)
        connection.close()
        handles = slow_slot.current.engine.handles
        eventually(lambda: len(handles) == n and all(handle.cancelled for handle in handles))
        assert httpx2.get(f"{server.url}/healthz").status_code == 200
        [line] = eventually(lambda: [row for row in log.rows if row.get("path") == "/v1/chat/completions"])
    assert line["status"] == 499
    assert line["version"] == "bot@20251202_115436"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"query": "hi"}),
        ("/v1/chat/completions", CHAT | {"n": 2}),
        ("/v1/completions", {"model": "bot", "prompt": "hi", "max_tokens": 5000}),
    ],
)
def test_leaving_before_the_answer_cancels_it(slow_slot, path, body):
    with live(slow_slot) as server:
        connection = send(server, path, body)
        handles = eventually(lambda: slow_slot.current.engine.handles)
        connection.close()
        eventually(lambda: all(handle.cancelled for handle in handles))


def test_a_client_that_stays_is_not_cancelled():
    slot = FakeSlot(answer=lambda prompt: "x" * 20, seconds_per_token=0.005)
    with live(slot) as server:
        assert httpx2.post(f"{server.url}/generate", json={"query": "hi"}).json()["response"] == "x" * 20
        assert slot.current.engine.handles[0].is_finished
        assert not slot.current.engine.handles[0].cancelled


def test_stopping_lets_a_running_stream_finish():
    slot = FakeSlot(answer=lambda prompt: "x" * 60, seconds_per_token=0.01)
    texts = []
    with live(slot) as server:

        def ask() -> None:
            texts.append(httpx2.post(f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}).text)

        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: slot.current.engine.handles)
        server.stop()
        asking.join()
    assert texts[0].count('"content": "x"') == 60
    assert texts[0].endswith("[DONE]\n\n")
    assert slot.closed


def test_a_stream_that_outlasts_the_drain_is_cut_and_cancelled(slow_slot):
    with live(slow_slot) as server:
        server.server.config.timeout_graceful_shutdown = 1
        connection = send(server, "/v1/chat/completions", CHAT | {"stream": True})
        eventually(lambda: slow_slot.current.engine.handles)
        server.stop()
        connection.close()
    assert slow_slot.current.engine.handles[0].cancelled
    assert slow_slot.closed


def test_a_swap_in_the_middle_of_a_stream_leaves_it_on_its_version():
    slot = FakeSlot(answer=lambda prompt: "x" * 40, seconds_per_token=0.01)
    with live(slot) as server:
        with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            slot.promoted = "20260101_000000"
            assert httpx2.get(f"{server.url}/refresh_model").json()["current_model_version"] == "20260101_000000"
            rest = [line for line in lines if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in [first, *rest]]
        assert {event["system_fingerprint"] for event in events} == {"bot@20251202_115436"}
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert answer.headers["x-model-version"] == "bot@20260101_000000"
        assert (
            httpx2.post(f"{server.url}/v1/chat/completions", json=CHAT | {"model": "bot@20251202_115436"}).status_code
            == 404
        )
