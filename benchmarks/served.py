"""A real server in a process of its own, versions that it may serve, and clients that ask it over HTTP."""

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_chats import qwen3

NAME = "swapped"
PROMPTS = [f"Question number {number}: what is it?" for number in range(12)]
MAX_TOKENS = 24


@dataclass
class Served:
    """A server at `base` that runs in `folder`; the first of its `versions` is the champion."""

    base: str
    folder: Path
    registry: Any
    versions: list[Any]

    def swap(self, version: Any) -> None:
        """Promote a version, and make the server look for it now."""
        self.registry.promote(NAME, version.id, by="benchmark")
        with urllib.request.urlopen(self.base + "/refresh_model", timeout=120) as reply:
            assert json.load(reply)["status"] == "success"


@contextmanager
def served(models: Iterable[tuple[Any, Any]]) -> Iterator[Served]:
    """A server of versions of these models, each with its tokenizer, for the time of a block."""
    from nightschool.store.home import Home
    from nightschool.store.registry import Registry

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = Home(folder / ".nightschool").ensure()
        registry = Registry(home)
        versions = [publish(registry, *pair) for pair in models]
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
            yield Served(address(server), folder, registry, versions)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def publish(registry: Any, model: Any, tokenizer: Any) -> Any:
    """A version of these weights."""
    from nightschool.models.export import save_version_folder
    from nightschool.store.versions import VersionMetadata

    facts = VersionMetadata(
        kind="model",
        method="full",
        base="bench",
        num_parameters=model.num_parameters(),
        dtype="float32",
        context_tokens=512,
    )
    return registry.publish(NAME, lambda folder: save_version_folder(model, tokenizer, folder), facts)


def random_models(count: int) -> Iterator[tuple[Any, Any]]:
    """Models with random weights, and their tokenizer."""
    from nightschool.data.tokenizer import train_bpe

    tokenizer = train_bpe([*PROMPTS, "a b c d e f g h i j k l m n o p q r s t u v w x y z"] * 4, vocab_size=400)
    for seed in range(1, count + 1):
        yield qwen3(len(tokenizer), seed=seed, max_position_embeddings=512), tokenizer


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


def health_seconds(base: str, duration: float) -> list[float]:
    """What each of many questions took."""
    seconds, until = [], time.monotonic() + duration
    while time.monotonic() < until:
        started = time.perf_counter()
        with urllib.request.urlopen(base + "/healthz", timeout=60) as reply:
            assert reply.status == 200
        seconds.append(time.perf_counter() - started)
        time.sleep(0.005)
    return seconds


def percentile_95(seconds: list[float]) -> float:
    """What one question in twenty exceeds."""
    return statistics.quantiles(seconds, n=20)[18]


def address(server: subprocess.Popen[str]) -> str:
    """Where the server says that it listens."""
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=lambda: [None for _ in server.stdout or ()], daemon=True).start()
            return found[0]
    sys.exit("The server ended before it listened.")
