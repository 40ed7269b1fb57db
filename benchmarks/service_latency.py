"""How long do /api/v1/health and /api/v1/training/status take while jobs train and models answer, and how soon does a new adapter?

A real server with a worker, over HTTP: organisations train on the small base by the queue while clients ask another
one's model without a pause. The peer is the same server left alone. A job's last step is the moment of its last row of
metrics; its first token is an answer of one token that names the new version.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from harness import Benchmark
from served import address, publish, random_models

PORTIONS = 40


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def get(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=300) as reply:
        return json.load(reply)


def conversations(count: int) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"Where is {n}?"}, {"role": "assistant", "content": f"In room {n}."}]}
        for n in range(count)
    ]


def start(base: str, org: str, epochs: int) -> str:
    settings = {"num_epochs": epochs, "learning_rate": 1e-3, "validation_split": 0, "gradient_checkpointing": False}
    body = {"org_id": org, "conversations": conversations(PORTIONS), **settings}
    return post(f"{base}/api/v1/training/start", body)["training_id"]


def ended(base: str, training_id: str) -> dict:
    while (job := get(f"{base}/api/v1/training/status/{training_id}"))["status"] not in ("completed", "failed"):
        time.sleep(0.05)
    assert job["status"] == "completed", job["error"]
    return job


def first_token(base: str, org: str) -> float:
    """The moment at which the organisation's model first answered."""
    body = {"message": "Where is 1?", "temperature": 0, "max_tokens": 1}
    while True:
        try:
            post(f"{base}/api/v1/generate?org_id={org}", body)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            time.sleep(0.02)
        else:
            return time.time()


def latencies(url: str, seconds: float) -> list[float]:
    taken, over = [], time.monotonic() + seconds
    while time.monotonic() < over:
        began = time.perf_counter()
        get(url)
        taken.append(time.perf_counter() - began)
        time.sleep(0.005)
    return sorted(taken)


def p99(taken: list[float]) -> float:
    return taken[min(len(taken) - 1, int(0.99 * len(taken)))]


def last_step_at(home: Path, org: str, job: dict) -> float:
    """When the run wrote its last row of metrics, which it does at the end of the step."""
    run = home / "tenants" / org / "runs" / job["metadata"]["run_id"].rpartition("/")[2]
    return (run / "metrics.jsonl").stat().st_mtime


def main() -> None:
    bench = Benchmark(
        "service_latency",
        "How long do health and status take while jobs train and models answer, and how soon does a new adapter?",
        {
            "health_p99_seconds": {"max": 0.1},
            "status_p99_seconds": {"max": 0.1},
            "first_token_after_last_step_seconds": {"max": 3.0},
        },
    )
    from nightschool.store.home import Home
    from nightschool.store.registry import Registry

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = Home(folder / ".nightschool").ensure()
        registry = Registry(home)
        [(model, tokenizer)] = list(random_models(1))
        version = publish(registry, model, tokenizer)
        registry.promote(version.name, version.id, by="benchmark")
        environment = {key: value for key, value in os.environ.items() if key != "NIGHTSCHOOL_HOME"}
        server = subprocess.Popen(
            [sys.executable, "-m", "nightschool.cli", "serve", "--with-worker", "--port", "0", "--log-level", "info"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"DEFAULT_BASE_MODEL": version.name, "OMP_NUM_THREADS": "1"},
        )
        try:
            base = address(server)
            figures = measure(base, home.path, bench.quick)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)
    delay = figures["first_token_after_last_step_seconds"]
    names = ("alone_health_p99_seconds", "health_p99_seconds", "status_p99_seconds")
    rows = [(name, f"{1000 * figures[name]:.1f} ms") for name in names]
    bench.table([*rows, ("last step to first token", f"{delay:.2f} s")])
    bench.finish(figures)


def measure(base: str, home: Path, quick: bool) -> dict[str, float]:
    """Train one organisation alone and wait for its answers; then ask while others train."""
    seconds = 5.0 if quick else 30.0
    alone = latencies(f"{base}/api/v1/health", seconds / 2)
    job_id = start(base, "first", 2)
    answered: list[float] = []
    waiting = threading.Thread(target=lambda: answered.append(first_token(base, "first")))
    waiting.start()
    job = ended(base, job_id)
    waiting.join()
    delay = answered[0] - last_step_at(home, "first", job)

    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            post(f"{base}/api/v1/generate?org_id=first", {"message": "Where is 2?", "max_tokens": 24})

    running = [start(base, f"other-{number}", 1000) for number in range(2)]
    while not all(get(f"{base}/api/v1/training/status/{one}")["metadata"].get("step", 0) > 2 for one in running):
        time.sleep(0.2)
    clients = [threading.Thread(target=client) for _ in range(2)]
    for one in clients:
        one.start()
    health = latencies(f"{base}/api/v1/health", seconds)
    status = latencies(f"{base}/api/v1/training/status/{running[0]}", seconds)
    states = {get(f"{base}/api/v1/training/status/{one}")["status"] for one in running}
    over.set()
    for one in clients:
        one.join()
    assert states == {"running"}, states
    for one in running:
        urllib.request.urlopen(
            urllib.request.Request(f"{base}/api/v1/training/jobs/{one}", method="DELETE"), timeout=60
        ).close()
    return {
        "health_p99_seconds": round(p99(health), 4),
        "status_p99_seconds": round(p99(status), 4),
        "alone_health_p99_seconds": round(p99(alone), 4),
        "first_token_after_last_step_seconds": round(delay, 2),
        "health_answers": len(health),
        "status_answers": len(status),
    }


if __name__ == "__main__":
    main()
