"""How long does /healthz take while a client posts the bodies of 2 MB that are dearest to refuse?

Token ids that are all wrong, parts of a message with an unknown key, and metadata with wrong values: each once blocked the
event loop for seconds. A real server over HTTP; the peer is the same server left alone.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

from harness import Benchmark
from served import NAME, health_seconds, percentile_95, random_models, served

PART = {"type": "text", "text": "a", "no": 1}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
BODIES = {
    "650,000 wrong token ids": ("/v1/completions", {"model": NAME, "prompt": [-1] * 650_000}),
    "45,000 parts with an unknown key": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "user", "content": [PART] * 45_000}]},
    ),
    "150,000 wrong metadata values": (
        "/v1/chat/completions",
        CHAT | {"metadata": {str(number): 1 for number in range(150_000)}},
    ),
}


def post(url: str, body: bytes) -> None:
    """Send a body that must be refused."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            status = reply.status
    except urllib.error.HTTPError as refused:
        status = refused.code
    assert status == 400, f"{url} answered {status}"


@contextmanager
def posting(url: str, body: bytes, refused: list[str]):
    """A client that sends one body after the other until the end; `refused` grows by one each time."""
    over, failed = threading.Event(), []

    def client() -> None:
        try:
            while not over.is_set():
                post(url, body)
                refused.append(url)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


def main() -> None:
    bench = Benchmark(
        "hostile_bodies",
        "How long does /healthz take while a client posts the bodies of 2 MB that are dearest to refuse?",
        {"p95_seconds": {"max": 0.1}},
    )
    duration = 6.0 if bench.quick else 30.0
    seconds, refused, rows = [], [], []
    with served(random_models(2)) as server:
        alone = health_seconds(server.base, duration / 2)
        rows.append(("alone", f"{len(alone)} answers, p95 {1000 * percentile_95(alone):.1f} ms"))
        for name, (path, body) in BODIES.items():
            before = len(refused)
            with posting(server.base + path, json.dumps(body, separators=(",", ":")).encode(), refused):
                of_body = health_seconds(server.base, duration)
            shown = f"p95 {1000 * percentile_95(of_body):.1f} ms, max {1000 * max(of_body):.1f} ms"
            rows.append((name, f"{shown}, {len(refused) - before} refused"))
            seconds += of_body
    bench.table(rows)
    bench.finish(
        {
            "p95_seconds": round(percentile_95(seconds), 4),
            "max_seconds": round(max(seconds), 4),
            "alone_p95_seconds": round(percentile_95(alone), 4),
            "refused": len(refused),
        }
    )


if __name__ == "__main__":
    main()
