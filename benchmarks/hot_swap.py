"""Does a swap under load lose, mislabel or mix an answer, and what does it do to the slowest ones?

A real server over HTTP, eight clients that never stop asking, and three versions whose greedy answers are known. Each
answer must be exactly that of the version that it names. A server keeps two versions warm, so each swap has to load one.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import real_model
import torch
from harness import Benchmark
from served import PROMPTS, ask, random_models, served

NUM_VERSIONS = 3


def real_models() -> Iterator[tuple[Any, Any]]:
    """The real model, and the same with some of its layers half as strong, which says other things."""
    loaded = real_model.load()
    yield loaded.model, loaded.tokenizer
    for first in range(NUM_VERSIONS - 1):
        with torch.no_grad():
            for layer in loaded.model.model.layers[first::4]:
                layer.mlp.down_proj.weight *= 0.5
        yield loaded.model, loaded.tokenizer


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
    if bench.is_real:
        duration, swaps = (40.0, 2) if bench.quick else (300.0, 20)
    else:
        duration, swaps = (12.0, 4) if bench.quick else (60.0, 20)
    with served(real_models() if bench.is_real else random_models(NUM_VERSIONS)) as server:
        known = {}
        for version in reversed(server.versions):
            server.swap(version)
            for prompt in PROMPTS:
                named, text = ask(server.base, prompt)
                assert named == version.ref
                known[named, prompt] = text
        Clients(server.base, known).run(2)
        # A part of the time each: what one version says may be longer than what another does.
        steady = Clients(server.base, known)
        for version in reversed(server.versions):
            server.swap(version)
            steady.run(duration / 2 / NUM_VERSIONS)
            print(f"  steady on {version.ref}: p99 {1000 * steady.p99:.0f} ms so far")
        swapping = Clients(server.base, known)
        load = threading.Thread(target=swapping.run, args=(duration,))
        load.start()
        swap_seconds = []
        for number in range(swaps):
            time.sleep(max(0.0, duration / swaps - (swap_seconds[-1] if swap_seconds else 0)) * 0.95)
            started = time.perf_counter()
            server.swap(server.versions[(number + 1) % NUM_VERSIONS])
            swap_seconds.append(time.perf_counter() - started)
        load.join()
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


if __name__ == "__main__":
    main()
