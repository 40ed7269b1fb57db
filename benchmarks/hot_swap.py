"""Does a swap under load lose, mislabel or mix an answer, and what does it do to the slowest ones?

A real server over HTTP, eight clients that never stop asking, and two versions whose greedy answers are known. Each
answer must be exactly that of the version that it names.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real_model
import torch
from harness import Benchmark
from real_chats import qwen3

NAME = "swapped"
PROMPTS = [f"Question number {number}: what is it?" for number in range(12)]
MAX_TOKENS = 24


def publish(home: Any, model: Any, tokenizer: Any) -> Any:
    """A version of these weights."""
    from nightschool.models.export import save_version_folder
    from nightschool.store.registry import Registry
    from nightschool.store.versions import VersionMetadata

    facts = VersionMetadata(
        kind="model",
        method="full",
        base="bench",
        num_parameters=model.num_parameters(),
        dtype="float32",
        context_tokens=512,
    )
    return Registry(home).publish(NAME, lambda folder: save_version_folder(model, tokenizer, folder), facts)


def random_pair() -> Iterator[tuple[Any, Any]]:
    """Two models with random weights, and their tokenizer."""
    from nightschool.data.tokenizer import train_bpe

    tokenizer = train_bpe([*PROMPTS, "a b c d e f g h i j k l m n o p q r s t u v w x y z"] * 4, vocab_size=400)
    for seed in (1, 2):
        yield qwen3(len(tokenizer), seed=seed, max_position_embeddings=512), tokenizer


def real_pair() -> Iterator[tuple[Any, Any]]:
    """The real model, and the same with every fourth layer half as strong, which says other things."""
    loaded = real_model.load()
    yield loaded.model, loaded.tokenizer
    with torch.no_grad():
        for layer in loaded.model.model.layers[::4]:
            layer.mlp.down_proj.weight *= 0.5
    yield loaded.model, loaded.tokenizer


def ask(base: str, prompt: str) -> tuple[str, str]:
    """The version that an answer names, and the answer."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        base + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        version = reply.headers["x-model-version"]
        plain = json.load(reply)
    assert plain["system_fingerprint"] == version, "header and body name different versions"
    return version, plain["choices"][0]["text"]


@dataclass
class Clients:
    """Eight clients; what they got, and how long each answer took."""

    base: str
    known: dict[tuple[str, str], str]
    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    mislabelled: int = 0
    mixed: int = 0

    def run(self, duration: float) -> None:
        """Ask for so many seconds."""
        deadline, lock = time.monotonic() + duration, threading.Lock()

        def client(place: int) -> None:
            while time.monotonic() < deadline:
                prompt, started = PROMPTS[place % len(PROMPTS)], time.perf_counter()
                place += 1
                try:
                    version, text = ask(self.base, prompt)
                except (OSError, ValueError, KeyError):
                    with lock:
                        self.failed += 1
                    continue
                with lock:
                    self.seconds.append(time.perf_counter() - started)
                    if text != self.known[version, prompt]:
                        others = {answer for (_, asked), answer in self.known.items() if asked == prompt}
                        self.mislabelled += text in others
                        self.mixed += text not in others

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @property
    def p99(self) -> float:
        """The time that one answer in a hundred exceeds, in seconds."""
        return statistics.quantiles(self.seconds, n=100)[98]


def main() -> None:
    bench = Benchmark(
        "hot_swap",
        "8 clients, 20 swaps in 60 s: failed, mislabelled, mixed answers; p99 while swapping against p99 steady",
        {"failed": {"max": 0}, "mislabelled": {"max": 0}, "mixed": {"max": 0}, "p99_ratio": {"max": 1.5}},
        has_real=True,
    )
    from nightschool.store.home import Home
    from nightschool.store.registry import Registry

    torch.set_num_threads(1)
    if bench.is_real:
        duration, swaps = (40.0, 2) if bench.quick else (300.0, 20)
    else:
        duration, swaps = (12.0, 4) if bench.quick else (60.0, 20)
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder) / ".nightschool")
        home.ensure()
        versions = [publish(home, *pair) for pair in (real_pair() if bench.is_real else random_pair())]
        registry = Registry(home)
        registry.promote(NAME, versions[0].id, by="benchmark")
        server = subprocess.Popen(
            [sys.executable, "-m", "nightschool.cli", "serve", NAME, "--port", "0", "--log-level", "info"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "NIGHTSCHOOL_HOME"},
        )
        try:
            base = address(server)
            known = {}
            for version in reversed(versions):
                registry.promote(NAME, version.id, by="benchmark")
                refresh(base)
                for prompt in PROMPTS:
                    named, text = ask(base, prompt)
                    assert named == version.ref
                    known[named, prompt] = text
            Clients(base, known).run(2)
            steady = Clients(base, known)
            steady.run(duration / 2)
            swapping = Clients(base, known)
            load = threading.Thread(target=swapping.run, args=(duration,))
            load.start()
            swap_seconds = []
            for number in range(swaps):
                time.sleep(max(0.0, duration / swaps - (swap_seconds[-1] if swap_seconds else 0)) * 0.95)
                registry.promote(NAME, versions[(number + 1) % 2].id, by="benchmark")
                started = time.perf_counter()
                refresh(base)
                swap_seconds.append(time.perf_counter() - started)
            load.join()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    bench.table(
        [
            ("steady", f"{len(steady.seconds)} answers, p99 {1000 * steady.p99:.0f} ms"),
            ("swapping", f"{len(swapping.seconds)} answers, p99 {1000 * swapping.p99:.0f} ms, {swaps} swaps"),
            ("one swap", f"{statistics.median(swap_seconds):.2f} s in the median"),
        ]
    )
    bench.finish(
        {
            "failed": steady.failed + swapping.failed,
            "mislabelled": steady.mislabelled + swapping.mislabelled,
            "mixed": steady.mixed + swapping.mixed,
            "p99_ratio": round(swapping.p99 / steady.p99, 3),
            "answers": len(steady.seconds) + len(swapping.seconds),
            "swaps": swaps,
        }
    )


def address(server: subprocess.Popen[str]) -> str:
    """Where the server says that it listens."""
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=lambda: [None for _ in server.stdout or ()], daemon=True).start()
            return found[0]
    sys.exit("The server ended before it listened.")


def refresh(base: str) -> None:
    """Make the server look for the champion now."""
    with urllib.request.urlopen(base + "/refresh_model", timeout=120) as reply:
        assert json.load(reply)["status"] == "success"


if __name__ == "__main__":
    main()
