"""How long does /healthz take while a model trains, another one is loaded and a third answers?

Nothing that blocks may run on the server's event loop. A real server over HTTP; a training run beside it; two versions
that are swapped over and over, and clients that never stop asking. The peer is the same server left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from harness import Benchmark
from served import PROMPTS, ask, health_seconds, percentile_95, random_models, served

ROWS = [{"query": f"Where is number {index}?", "retrieved": f"In room {index + 7}."} for index in range(16)]


@contextlib.contextmanager
def training(folder: Path, base: str):
    """A run that does not end, on one thread, as a night starts it beside a server."""
    from nightschool.config.recipe import Recipe
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore

    (folder / "rows.json").write_text(json.dumps(ROWS))
    train = {"max_steps": 1_000_000, "dtype": "fp32", "num_threads": 1, "max_seq_len": 128}
    plain = {"name": "night", "base": base, "data": [{"path": str(folder / "rows.json")}], "train": train}
    home = Home(folder / ".nightschool")
    run = RunStore(home).create(Recipe.model_validate(plain).as_plain(), name="night")
    command = [sys.executable, "-m", "nightschool.training.run", "--home", str(home.path), "--run", run.id]
    with (folder / "training.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        while run.status.step < 2:
            if process.poll() is not None:
                sys.exit((folder / "training.log").read_text())
            time.sleep(0.1)
        yield
        assert process.poll() is None, "the run has ended"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def busy(base: str, swap):
    """Two clients that ask, and a version that is swapped, until the end."""
    over = threading.Event()

    def client(place: int) -> None:
        while not over.is_set():
            ask(base, PROMPTS[place % len(PROMPTS)])
            place += 1

    def swapper() -> None:
        number = 0
        while not over.is_set():
            number += 1
            swap(number)

    threads = [threading.Thread(target=client, args=(0,)), threading.Thread(target=client, args=(5,))]
    threads.append(threading.Thread(target=swapper))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def main() -> None:
    bench = Benchmark(
        "event_loop",
        "How long does /healthz take while the machine trains and the server loads and answers?",
        {"busy_p95_seconds": {"max": 0.1}},
    )
    duration = 6.0 if bench.quick else 30.0
    swaps = []
    with served(random_models(2)) as server:

        def swap(number: int) -> None:
            server.swap(server.versions[number % 2])
            swaps.append(number)

        alone = health_seconds(server.base, duration / 2)
        with training(server.folder, server.versions[0].ref), busy(server.base, swap):
            beside = health_seconds(server.base, duration)
    bench.table(
        [
            ("alone", f"{len(alone)} answers, p95 {1000 * percentile_95(alone):.1f} ms"),
            ("busy", f"{len(beside)} answers, p95 {1000 * percentile_95(beside):.1f} ms, {len(swaps)} swaps"),
        ]
    )
    bench.finish(
        {
            "busy_p95_seconds": round(percentile_95(beside), 4),
            "alone_p95_seconds": round(percentile_95(alone), 4),
            "swaps": len(swaps),
        }
    )


if __name__ == "__main__":
    main()
