"""Does every checkpoint arrive, whole and in order, through a network that fails and processes that are killed?

A process commits checkpoints as a trainer's writer does. An uploader brings them to an S3 server (moto) through a proxy
that hits every eighth request: refused, cut, stalled, corrupted, answer lost or cut. SIGKILL hits the uploader or the
committing process at random moments; whoever was killed is started again. Each time a manifest is stored, everything
that it names is at once read from the server behind the proxy and compared. In the end every object is.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
from fault_proxy import Exchange, FaultProxy, fault_proxy
from harness import Benchmark
from obstore.store import S3Store
from stores import s3_server

BUCKET = "bucket"
STALL_SECONDS = 3.0
# Between two commits: so many that the uploader is killed while there is something to do, in the end too.
PACE_SECONDS = 0.9
COMMITTER = """
import random, sys, time
from pathlib import Path
from nightschool.config.checkpoints import Upload
from nightschool.store import checkpoints
from nightschool.store.atomic import publish_directory, sweep_partials
from nightschool.store.home import Home
from nightschool.store.manifest import write_manifest
from nightschool.store.runs import RunStore
from nightschool.uploads.journal import Journal

home = Home(Path(sys.argv[1]))
run = RunStore(home).ls()[0]
sweep_partials(run.checkpoints_path)
have = {point.step for point in checkpoints.ls(run)}
for step in range(1, int(sys.argv[2]) + 1):
    if step in have:
        continue
    rng = random.Random(step)
    path = checkpoints.checkpoint_path(run, 0, step, 1)
    with publish_directory(path) as folder:
        (folder / "model.safetensors").write_bytes(rng.randbytes(9_000_000 if step % 10 == 0 else 200_000))
        (folder / "optimizer.safetensors").write_bytes(rng.randbytes(400_000))
        (folder / "state.json").write_text("{}")
        write_manifest(folder, step=step, attempt=1)
    # The uploader is kept alive by the benchmark, which counts it.
    Journal(home).enqueue(path, Upload(url=sys.argv[3]))
    time.sleep(rng.uniform(0, 2 * float(sys.argv[4])))
"""


class Watch:
    """What is looked at while it goes on: the server behind the proxy, at each manifest that is stored."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.early_manifests: list[str] = []
        self.manifests = 0

    def __call__(self, exchange: Exchange) -> None:
        if exchange.method != "PUT" or not exchange.path.endswith("/manifest.json"):
            return
        files = files_of(get(self._server, exchange.path))
        if files is None:
            return
        self.manifests += 1
        folder = exchange.path.rpartition("/")[0]
        for name, facts in files.items():
            if digest(get(self._server, f"{folder}/{name}")) != facts["sha256"]:
                self.early_manifests.append(f"{folder}/{name}")


def files_of(manifest: bytes | None) -> dict[str, Any] | None:
    """What a manifest names. None if it did not arrive, or was corrupted on its way, which it says itself."""
    try:
        plain = json.loads(manifest or b"")
        stated = plain.pop("digest")
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return dict(plain["files"]) if digest(canonical.encode()) == stated else None
    except (ValueError, KeyError):
        return None


def get(server: str, path: str) -> bytes | None:
    """An object as the server itself has it, not by way of the proxy."""
    bucket, _, key = path.lstrip("/").partition("/")
    options: Any = {"allow_http": True}
    try:
        return bytes(obstore.get(S3Store(bucket, endpoint=server, client_options=options), key).bytes())
    except FileNotFoundError:
        return None


def digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def sent_again(exchanges: list[Exchange]) -> int:
    """How many files were sent once more although they had arrived whole, and the sender had been told."""
    arrived: set[str] = set()
    again = 0
    for exchange in exchanges:
        # A file in one piece is one PUT; one in parts ends with the POST that joins them.
        whole = exchange.method == "POST" or "partNumber" not in exchange.target
        if not exchange.path.endswith((".safetensors", "state.json")) or exchange.method not in ("PUT", "POST"):
            continue
        if "uploads" in exchange.target.partition("?")[2] and "uploadId" not in exchange.target:
            continue
        if whole and exchange.stored:
            again += exchange.path in arrived
            arrived.add(exchange.path)
        elif whole:
            arrived.discard(exchange.path)
    return again


class Processes:
    """The committing process and the uploader: started, killed, started again."""

    def __init__(self, home: Path, num_checkpoints: int, url: str, env: dict[str, str]) -> None:
        self._commands = {
            "committer": [sys.executable, "-c", COMMITTER, str(home), str(num_checkpoints), url, str(PACE_SECONDS)],
            "uploader": [
                sys.executable, "-m", "nightschool.jobs.uploader", "--home", str(home),
                "--idle-seconds", "3", "--timeout-seconds", str(STALL_SECONDS - 1),
            ],
        }  # fmt: skip
        self._env = env
        self._log = (home / "bench.log").open("ab")
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.committed = False

    def keep_alive(self) -> None:
        for name, command in self._commands.items():
            process = self.running.get(name)
            if process is not None and process.poll() is None:
                continue
            if name == "committer":
                self.committed = self.committed or (process is not None and process.returncode == 0)
                if self.committed:
                    continue
            self.running[name] = subprocess.Popen(command, env=self._env, stdout=self._log, stderr=self._log)

    def kill(self, name: str) -> bool:
        process = self.running.get(name)
        if process is None or process.poll() is not None:
            return False
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()
        self._log.close()


def run(folder: Path, num_checkpoints: int, num_kills: int, server: str, proxy: FaultProxy) -> dict[str, Any]:
    from nightschool.store import checkpoints
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.uploads.journal import Journal

    home = Home(folder / "home").ensure()
    url = f"s3://{BUCKET}/run"
    made = RunStore(home).create(
        {"name": "bot", "checkpoints": {"upload": {"url": url}}}, name="bot", moment=datetime(2026, 11, 21, tzinfo=UTC)
    )
    watch = Watch(server)
    proxy.on_exchange = watch
    rng = random.Random(1)
    processes = Processes(home.path, num_checkpoints, url, os.environ | {"AWS_ENDPOINT_URL": proxy.url})
    kills, next_kill = 0, time.monotonic() + 1.0
    try:
        deadline = time.monotonic() + 1800
        while time.monotonic() < deadline:
            processes.keep_alive()
            if kills < num_kills and time.monotonic() > next_kill and Journal(home).bytes_left():
                victim = "committer" if rng.random() < 0.3 and not processes.committed else "uploader"
                kills += processes.kill(victim)
                next_kill = time.monotonic() + rng.uniform(0.5, 1.5)
            if processes.committed and Journal(home).bytes_left() == 0:
                rows = Journal(home).ls()
                if all(row.state in ("done", "failed") for row in rows) and len(rows) == num_checkpoints:
                    break
            time.sleep(0.05)
    finally:
        processes.end()
    rows = Journal(home).ls()
    wrong = []
    for point in checkpoints.ls(made):
        folder = f"/{BUCKET}/run/{made.id}/{point.name}"
        wrong += [
            f"{point.name}/{path.name}"
            for path in point.path.iterdir()
            if get(server, f"{folder}/{path.name}") != path.read_bytes()
        ]
    latest = json.loads(get(server, f"/{BUCKET}/run/LATEST.json") or b"{}")
    return {
        "not_done": num_checkpoints - sum(row.state == "done" for row in rows),
        "wrong": wrong,
        "early": watch.early_manifests,
        "manifests": watch.manifests,
        "kills": kills,
        "latest_step": latest.get("step"),
        "log": (home.path / "bench.log").read_text()[-3000:],
        "errors": [row.error for row in rows if row.state != "done"][:3],
    }


def main() -> None:
    bench = Benchmark(
        "upload_faults",
        __doc__.splitlines()[0],
        {
            "objects_missing_or_wrong": {"max": 0},
            "checkpoints_not_uploaded": {"max": 0},
            "manifests_before_their_data": {"max": 0},
            "files_sent_again_per_kill": {"max": 1},
            "steps_the_pointer_is_behind": {"max": 0},
        },
    )
    num_checkpoints, num_kills = (12, 6) if bench.quick else (100, 50)
    with (
        tempfile.TemporaryDirectory(prefix="upload-faults-") as name,
        s3_server(BUCKET) as port,
        fault_proxy(port, share=1 / 8, stall_seconds=STALL_SECONDS) as proxy,
    ):
        found = run(Path(name), num_checkpoints, num_kills, f"http://127.0.0.1:{port}", proxy)
    hit = [exchange.fault for exchange in proxy.exchanges if exchange.fault is not None]
    again = sent_again(proxy.exchanges)
    bench.table(
        [
            ("checkpoints, kills", f"{num_checkpoints}, {found['kills']}"),
            ("requests, of which hit", f"{len(proxy.exchanges)}, {len(hit)}"),
            ("faults", ", ".join(f"{kind} {hit.count(kind)}" for kind in sorted(set(hit)))),
            ("manifests looked at", str(found["manifests"])),
            ("files sent again although they had arrived", str(again)),
            *(("wrong", one) for one in found["wrong"][:5]),
            *(("early", one) for one in found["early"][:5]),
            *(("not uploaded", one) for one in found["errors"]),
        ]
    )
    if found["not_done"] or found["wrong"]:
        print(found["log"])
    bench.finish(
        {
            "objects_missing_or_wrong": len(found["wrong"]),
            "checkpoints_not_uploaded": found["not_done"],
            "manifests_before_their_data": len(found["early"]),
            "files_sent_again_per_kill": again / max(1, found["kills"]),
            "steps_the_pointer_is_behind": num_checkpoints - (found["latest_step"] or 0),
            "kills": found["kills"],
            "faults": len(hit),
        }
    )


if __name__ == "__main__":
    main()
