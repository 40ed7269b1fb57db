"""What do kills do to jobs? SIGKILL of workers, jobs, trainers and of whoever submits, on SQLite and on PostgreSQL.

Some jobs are alone in their processes, others share them with jobs on the same base; both kinds of process are killed.

Everything about jobs is real, processes and database and disk; only training and the gate are toys (toy_jobs/), so that
fifty kills fit into a minute. Then: how often is a job claimed twice, and how many claims and finishes are there a second,
by four workers on SQLite? There is no peer: a queue that loses or doubles jobs is no slower one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import psutil
from harness import Benchmark
from postgres import is_installed, postgres_cluster

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
LONGEST_SECONDS = 600.0
BATCH = 10_000
# How often a process of a kind is the victim, where there is one.
WEIGHTS = {"job": 2, "trainer": 4, "group": 3, "shared trainer": 6, "worker": 1, "submitter": 1}
GROUPS = {"MAX_CONCURRENT_TRAININGS": "4", "MAX_JOBS_PER_BASE": "5"}


class Battle:
    """A home whose workers, jobs and submitter are killed at random moments."""

    def __init__(self, folder: Path, environment: dict[str, str], jobs: int, seed: int) -> None:
        from nightschool.store.home import Home

        self.home, self.jobs, self.random = Home(folder / "home").ensure(), jobs, random.Random(seed)
        self.environment = os.environ | environment | GROUPS | {"PYTHONPATH": str(ROOT)}
        self.said = folder / "said.jsonl"
        self.workers = [self.start_worker() for _ in range(WORKERS)]
        self.submitter = self.start_submitter()
        self.kills: Counter[str] = Counter()

    def start_worker(self) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "benchmarks.toy_jobs.worker", "--home", str(self.home.path), "--until-eof"]
        return subprocess.Popen(line, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def start_submitter(self) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "benchmarks.toy_jobs.submit", str(self.home.path), str(self.jobs)]
        with self.said.open("ab") as output:
            return subprocess.Popen(line, env=self.environment, stdout=output)

    def kill_somebody(self) -> None:
        """Kill one process of a kind that is there, and start again what nobody else starts again."""
        places = {
            "worker": self.workers,
            "job": self.find("toy_jobs.job", group=False),
            "group": self.find("toy_jobs.job", group=True),
            "trainer": self.find("toy_jobs.train"),
            "shared trainer": self.find("toy_jobs.train_together"),
        }
        if self.submitter.poll() is None:
            places["submitter"] = [self.submitter]
        # Mostly when there is something to lose, and now and then while they start.
        weights = {kind: WEIGHTS[kind] for kind in places if places[kind]}
        if not (places["job"] or places["group"]) and self.random.random() < 0.8:
            return
        kind = self.random.choices(list(weights), list(weights.values()))[0]
        victim = self.random.choice(places[kind])
        try:
            os.kill(victim.pid, 9)
        except ProcessLookupError:
            return
        self.kills[kind] += 1
        if kind == "worker":
            victim.wait()
            self.workers[self.workers.index(victim)] = self.start_worker()
        elif kind == "submitter":
            victim.wait()
            self.submitter = self.start_submitter()

    def find(self, module: str, *, group: bool | None = None) -> list[psutil.Process]:
        """Processes of this home; with `group`, only those that are at several jobs, or at one."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            is_meant = group is None or ("--group" in line) == group
            if f"benchmarks.{module}" in line and str(self.home.path) in line and is_meant:
                found.append(process)
        return found

    def fight(self, kills: int) -> None:
        deadline = time.monotonic() + LONGEST_SECONDS
        while sum(self.kills.values()) < kills and time.monotonic() < deadline:
            time.sleep(self.random.uniform(0.1, 2.0))
            self.kill_somebody()

    def end(self) -> None:
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()
        for name in ("job", "train", "train_together"):
            for process in self.find(f"toy_jobs.{name}"):
                process.kill()


def look(battle: Battle, environment: dict[str, str]) -> dict[str, int]:
    """Wait until all jobs have ended, and count what went wrong with them."""
    from nightschool.events import read_events
    from nightschool.store.database import Database
    from nightschool.store.job_queue import FINAL_STATES, JobQueue
    from nightschool.store.registry import Registry
    from nightschool.store.runs import RunStore

    with Database(battle.home, env=environment) as database:
        queue, deadline = JobQueue(database), time.monotonic() + LONGEST_SECONDS
        while time.monotonic() < deadline:
            jobs = queue.ls()
            if battle.submitter.poll() is not None and all(job.state in FINAL_STATES for job in jobs):
                break
            time.sleep(0.2)
    told = [json.loads(line) for line in battle.said.read_text().splitlines()]
    submitted = {row["submitted"] for row in told if "submitted" in row}
    cancelled = {row["cancelled"] for row in told if "cancelled" in row}
    cancelling = {row["cancelling"] for row in told if "cancelling" in row}
    ended = {job.id for job in jobs if job.state in FINAL_STATES}
    wrong = 0
    for job in jobs:
        may_be = {"cancelled"} if job.id in cancelled else {"completed"}
        may_be |= {"cancelled"} if job.id in cancelling else set()
        wrong += job.state not in may_be or (job.state == "completed" and job.outcome != "promoted")
    registry, runs = Registry(battle.home), RunStore(battle.home).ls()
    made = Counter(version.facts.run_id for name in registry.names() for version in registry.versions(name))
    moved = Counter(move.by for name in registry.names() for move in registry.history(name) if move.alias == "champion")
    trained = {run.id for run in runs if any(row["event"] == "cycle" for row in read_events(run.events_path))}
    done = {job.run_id for job in jobs if job.state == "completed"}
    doubled = [key for counts in (made, moved) for key, count in counts.items() if count > 1]
    strangers = {run_id for run_id in made if run_id not in done} | (trained - {job.run_id for job in jobs})
    return {
        "lost": len(submitted - ended) + (battle.jobs - len(jobs)),
        "doubled": len(doubled) + len(strangers),
        "wrong": wrong,
    }


def claim_and_finish(path: str, gate, found) -> None:
    """Claim and finish what there is, and say which jobs those were."""
    from nightschool.store.home import Home
    from nightschool.store.job_queue import JobQueue

    queue, mine = JobQueue(Home(Path(path)).database), []
    queue.ls(limit=1)
    gate.wait()
    began = time.process_time()
    while (job := queue.claim(most_running=1000)) is not None:
        queue.finish(job, "completed")
        mine.append(job.id)
    found.put((mine, time.process_time() - began))


def claims(folder: Path, number: int) -> tuple[int, float, float]:
    """How many of so many jobs were claimed twice by four workers, pairs of claim and finish in a second, and the CPU
    seconds of one pair.
    """
    from nightschool.store import tables
    from nightschool.store.home import Home
    from nightschool.store.job_queue import Job

    home = Home(folder / "home")
    rows = (
        asdict(Job(f"train_{k:012x}", f"tenant-{k % 8}", f"bot-{k}", {"method": "lora"}, "/", "api"))
        for k in range(number)
    )
    while batch := list(islice(rows, BATCH)):
        with home.database.write() as connection:
            connection.execute(tables.jobs.insert(), batch)
    spawn = multiprocessing.get_context("spawn")
    gate, found = spawn.Barrier(5), spawn.Queue()
    workers = [spawn.Process(target=claim_and_finish, args=(str(home.path), gate, found)) for _ in range(4)]
    for worker in workers:
        worker.start()
    gate.wait()
    began = time.monotonic()
    parts = [found.get() for _ in workers]
    seconds = time.monotonic() - began
    for worker in workers:
        worker.join()
    claimed = [job_id for mine, _ in parts for job_id in mine]
    cpu_seconds = sum(used for _, used in parts)
    return len(claimed) - len(set(claimed)) + abs(number - len(set(claimed))), number / seconds, cpu_seconds / number


def main() -> None:
    bench = Benchmark(
        "job_durability",
        "What do kills do to jobs?",
        {
            "lost_jobs": {"max": 0},
            "double_effects": {"max": 0},
            "wrong_states": {"max": 0},
            "double_claims": {"max": 0},
            "claims_and_finishes_per_second": {"min": 300},
        },
    )
    jobs, kills, number = (6, 8, 500) if bench.quick else (20, 50, 100_000)
    totals: Counter[str] = Counter()
    rows = []
    with ExitStack() as stack:
        databases = {"SQLite": {}}
        if is_installed() and not bench.quick:
            databases["PostgreSQL"] = {
                "DATABASE_URL": stack.enter_context(postgres_cluster()).format(database="postgres")
            }
        for database, environment in databases.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            battle = Battle(folder, environment, jobs, seed=7)
            try:
                battle.fight(kills)
                found = look(battle, environment)
            finally:
                battle.end()
            totals.update(found)
            killed = ", ".join(f"{count} of a {kind}" for kind, count in sorted(battle.kills.items()))
            rows.append(
                (
                    f"{jobs} jobs on {database}, killed: {killed}",
                    f"{found['lost']} lost, {found['doubled']} doubled, {found['wrong']} wrong",
                )
            )
        double, pairs, cpu_seconds = claims(Path(stack.enter_context(tempfile.TemporaryDirectory())), number)
    rows.append(
        (
            f"{number} claims by 4 workers on SQLite",
            f"{double} double, {pairs:.0f} claims and as many finishes a second, {1000 * cpu_seconds:.1f} ms of CPU a pair",
        )
    )
    bench.table(rows)
    bench.finish(
        {
            "lost_jobs": totals["lost"],
            "double_effects": totals["doubled"],
            "wrong_states": totals["wrong"],
            "double_claims": double,
            "claims_and_finishes_per_second": round(2 * pairs, 1),
            "cpu_seconds_per_pair": round(cpu_seconds, 5),
            "databases": len(databases),
            "kills": kills * len(databases),
        }
    )


if __name__ == "__main__":
    main()
