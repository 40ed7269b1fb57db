"""What does uploading cost: MB/s against a bare obstore `put`, CPU seconds in the uploader and the trainer, slower steps?

The bytes go to an S3 server (moto) on the same machine, which is niced because it stands for another one. CPU seconds are
those of the processes themselves. The step is a matrix product in one thread of the process that trains; another process
persists checkpoints, as the writer of a trainer does, and the uploader brings them away.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import torch
from harness import Benchmark
from obstore.store import S3Store
from stores import s3_server

BUCKET = "bucket"
PART_BYTES = 8 << 20


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def in_process(work: Callable[..., tuple[float, float]], *arguments: Any) -> tuple[float, float]:
    """Do it in a new process; returns its wall and CPU seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def bare_put(path: str, port: int) -> tuple[float, float]:
    """obstore, its own defaults but for the size of a part."""
    options: Any = {"allow_http": True, "timeout": timedelta(seconds=120)}
    store = S3Store(BUCKET, endpoint=f"http://127.0.0.1:{port}", client_options=options)
    wall, cpu = time.perf_counter(), cpu_seconds()
    obstore.put(store, "bare", Path(path), chunk_size=PART_BYTES)
    return time.perf_counter() - wall, cpu_seconds() - cpu


def our_put(home_path: str, checkpoint: str, url: str) -> tuple[float, float]:
    """What the uploader does with one checkpoint: journal, data, comparison, manifest, pointers."""
    from nightschool.config.checkpoints import Upload
    from nightschool.remotes import open_remote
    from nightschool.store.home import Home
    from nightschool.uploads.journal import Journal
    from nightschool.uploads.push import attempt

    journal = Journal(Home(Path(home_path)))
    upload = journal.enqueue(Path(checkpoint), Upload(url=url))
    # The library is loaded before, as it is in a process that stays.
    open_remote(url)
    claimed = journal.claim(upload.id)
    assert claimed is not None
    wall, cpu = time.perf_counter(), cpu_seconds()
    done = attempt(journal, claimed, say=lambda _: None)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    assert done.state == "done", done.error
    return wall, cpu


def make_checkpoint(run: Any, step: int, num_bytes: int) -> Path:
    from nightschool.store.atomic import publish_directory
    from nightschool.store.checkpoints import checkpoint_path
    from nightschool.store.manifest import write_manifest

    path = checkpoint_path(run, 0, step, 1)
    with publish_directory(path) as folder:
        (folder / "model.safetensors").write_bytes(os.urandom(num_bytes))
        write_manifest(folder, step=step, attempt=1)
    return path


def write_and_enqueue(orders: Any, home_path: str, run_id: str, num_bytes: int) -> None:
    """What the writer of a trainer does: it persists a checkpoint and enters it; the uploader does the rest."""
    from nightschool import uploads
    from nightschool.config.checkpoints import Upload
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.uploads.journal import Journal

    home = Home(Path(home_path))
    run = RunStore(home).get(run_id)
    os.nice(10)
    orders.send("ready")
    while True:
        try:
            step = orders.recv()
        except EOFError:
            return
        path = make_checkpoint(run, step, num_bytes)
        Journal(home).enqueue(path, Upload(url=f"s3://{BUCKET}/beside"))
        uploads.ensure_uploader(home)
        orders.send(str(path))


def steps(seconds: float, weight: torch.Tensor) -> list[float]:
    """The duration of every step in that time."""
    durations = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        torch.mm(weight, weight)
        durations.append(time.perf_counter() - started)
    return durations


def main() -> None:
    bench = Benchmark(
        "upload_speed",
        __doc__.splitlines()[0],
        {
            "speed_of_obstore": {"min": 0.8},
            "uploader_cpu_seconds_per_100_mb": {"max": 0.25},
            "trainer_cpu_seconds_per_100_mb": {"max": 0},
            "step_while_uploading": {"max": 1.5},
        },
    )
    from nightschool import uploads
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore

    num_bytes, rounds = (100_000_000, 2) if bench.quick else (200_000_000, 4)
    torch.set_num_threads(1)
    weight = torch.randn(700, 700)
    with tempfile.TemporaryDirectory(prefix="upload-speed-") as name, s3_server(BUCKET) as port:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        home = Home(Path(name) / "home").ensure()
        run = RunStore(home).create({"name": "bot"}, name="bot")
        bare, ours = [], []
        for index in range(rounds):
            path = make_checkpoint(run, index + 1, num_bytes)
            url = f"s3://{BUCKET}/{index}"
            bare.append(in_process(bare_put, str(path / "model.safetensors"), port))
            ours.append(in_process(our_put, str(home.path), str(path), url))
        alone, beside, handed_over = [], [], []
        mine, its = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        writer = context.Process(target=write_and_enqueue, args=(its, str(home.path), run.id, num_bytes), daemon=True)
        writer.start()
        mine.recv()
        for index in range(rounds):
            alone += steps(1.5 if bench.quick else 5.0, weight)
            cpu = cpu_seconds()
            mine.send(100 + index)
            handed_over.append(cpu_seconds() - cpu)
            while not mine.poll():
                beside += steps(0.25, weight)
            path = Path(mine.recv())
            while uploads.is_pending(home, path):
                beside += steps(0.5, weight)
        mine.close()
        writer.join()
    megabytes = num_bytes / 1e6
    bare_speed = [megabytes / wall for wall, _ in bare]
    our_speed = [megabytes / wall for wall, _ in ours]
    per_100 = 100 / megabytes
    figures = {
        "speed_of_obstore": statistics.median(a / b for a, b in zip(our_speed, bare_speed, strict=True)),
        "uploader_cpu_seconds_per_100_mb": statistics.median(cpu * per_100 for _, cpu in ours),
        # The seconds depend on the machine of the moment; what they are of obstore's own, on the same bytes, does not.
        "uploader_cpu_of_obstore": statistics.median(a / b for (_, a), (_, b) in zip(ours, bare, strict=True)),
        "obstore_cpu_seconds_per_100_mb": statistics.median(cpu * per_100 for _, cpu in bare),
        # To the hundredth: what it takes to send one message.
        "trainer_cpu_seconds_per_100_mb": round(statistics.median(handed_over) * per_100, 2),
        "step_while_uploading": statistics.mean(beside) / statistics.mean(alone),
    }
    bench.table(
        [
            ("bytes of a checkpoint", f"{num_bytes:,}"),
            (
                "bare obstore",
                f"{statistics.median(bare_speed):.0f} MB/s, {figures['obstore_cpu_seconds_per_100_mb']:.3f} CPU s",
            ),
            (
                "ours",
                f"{statistics.median(our_speed):.0f} MB/s, {figures['uploader_cpu_seconds_per_100_mb']:.3f} CPU s",
            ),
            ("step alone", f"{statistics.mean(alone) * 1e3:.2f} ms"),
            ("step while uploading", f"{statistics.mean(beside) * 1e3:.2f} ms"),
        ]
    )
    bench.finish(figures)


if __name__ == "__main__":
    main()
