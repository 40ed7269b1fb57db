"""Bodies that are too large, too slow, broken or hostile: each is answered, and the server goes on."""

import json
import socket

import httpx2
import pytest

from tests.support.fake_slot import FakeSlot
from tests.support.live_server import client_of, live


@pytest.fixture(scope="module")
def server():
    with live(FakeSlot(), body_timeout_seconds=1.0) as server:
        yield server


def raw(server, data: bytes, *more: bytes, seconds: float = 10.0) -> bytes:
    """Send bytes, and whatever follows, and read until the server closes or a whole answer is there."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        for part in more:
            connection.sendall(part)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
            head, separator, body = answer.partition(b"\r\n\r\n")
            if separator and b"content-length" in head.lower():
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                if len(body) >= length:
                    break
        return answer


def head(server, *lines: str, path: str = "/generate") -> bytes:
    fixed = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Content-Type: application/json"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def test_a_prompt_of_ten_megabytes_is_413_and_the_client_sees_it(server):
    answer = httpx2.post(f"{server.url}/generate", json={"query": "x" * 10_000_000})
    assert answer.status_code == 413
    assert "2000000" in answer.json()["detail"]
    chat = {"model": "bot", "messages": [{"role": "user", "content": "x" * 10_000_000}]}
    assert httpx2.post(f"{server.url}/v1/chat/completions", json=chat).json()["error"]["code"] == "body_too_large"
    assert httpx2.post(f"{server.url}/generate", json={"query": "x"}).status_code == 200


def test_a_declared_length_is_refused_before_the_body_is_read(server):
    """Nothing follows the headers: who waited for the body would answer 408 when its time is over."""
    answer = raw(server, head(server, "Content-Length: 999999999999"))
    assert b" 413 " in answer.split(b"\r\n")[0]


def test_a_chunked_body_is_counted_while_it_comes(server):
    def chunks():
        for _ in range(100):
            yield b"x" * 100_000

    answer = httpx2.post(f"{server.url}/generate", content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    small = iter([b'{"que', b'ry": "a"}'])
    answer = httpx2.post(f"{server.url}/generate", content=small, headers={"content-type": "application/json"})
    assert answer.status_code == 200


def test_a_body_that_does_not_come_is_408(server):
    answer = raw(server, head(server, "Content-Length: 100"), b'{"query": ')
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert httpx2.get(f"{server.url}/healthz").status_code == 200


def test_endless_headers_are_refused(server):
    answer = raw(server, head(server, *[f"X-{number}: {'y' * 1000}" for number in range(100)])[:-2])
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert httpx2.get(f"{server.url}/healthz").status_code == 200


BROKEN = [
    b"",
    b"{",
    b'{"query": "a"',
    b'{"query": "\xff\xfe"}',
    b"\x00\x01\x02",
    b'{"query": "\\ud800"}',
    b"[1]",
    b"null",
    b'"query"',
    b"7",
    b'{"query": NaN}',
    b'{"query": "a", "temperature": NaN}',
    b'{"query": "a", "temperature": Infinity}',
    b'{"query": "a", "max_new_tokens": 1e400}',
    b'{"query": "a", "max_new_tokens": ' + b"9" * 5000 + b"}",
    b'{"\\ud800": 1, "query": "a"}',
    b"[" * 100_000,
    b'{"query":' * 50_000,
    b"\xef\xbb\xbf{",
]


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: repr(body[:24]))
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions", "/api/feedback"])
def test_broken_bodies_are_refused_in_the_spelling_of_the_family(server, path, body):
    answer = httpx2.post(f"{server.url}{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in ((400,) if path.startswith("/v1") else (400, 422)), answer.text
    content = answer.json()
    if path.startswith("/v1"):
        assert content["error"]["type"] == "invalid_request_error"
    elif path.startswith("/api"):
        assert content["status"] == answer.status_code
    else:
        assert content["detail"]


def test_malformed_json_says_where():
    with client_of(FakeSlot()) as client:
        answer = client.post("/generate", content=b'{"query": }', headers={"content-type": "application/json"})
    assert answer.json()["detail"][0]["msg"].endswith("at line 1 column 11.")


def test_errors_never_repeat_what_was_sent():
    secret = "my secret question"
    with client_of(FakeSlot()) as client:
        for body in ({"query": [secret]}, {"query": "a", "temperature": secret}):
            assert secret not in client.post("/generate", json=body).text
            assert secret not in client.post("/v1/completions", json={"prompt": {"x": secret}}).text


def test_a_text_with_every_kind_of_character_survives():
    text = "NUL \x00, 世界, 👩‍👩‍👧, \u2028, \x7f, \U0010ffff"
    with client_of(FakeSlot(answer=lambda prompt: text)) as client:
        assert client.post("/generate", json={"query": text}).json()["response"] == text
        body = {"model": "bot", "prompt": text, "stream": True, "max_tokens": 200}
        lines = client.post("/v1/completions", json=body).text.split("\n\n")
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == text


def test_a_full_queue_is_429_with_retry_after():
    with client_of(FakeSlot(queue_limit=0)) as client:
        answer = client.post("/generate", json={"query": "a"})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json() == {"detail": "0 requests wait. Try again later."}


def test_unknown_paths_and_methods_have_the_spelling_of_their_family():
    with client_of(FakeSlot()) as client:
        assert client.get("/nope").json()["detail"].startswith("There is no /nope here.")
        assert client.get("/v1/nope").json()["error"]["code"] == "not_found"
        assert client.get("/api/nope").headers["content-type"] == "application/problem+json"
        wrong = client.get("/generate")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        assert client.post("/generate/", json={"query": "a"}).status_code == 404, "no redirect of a body"
