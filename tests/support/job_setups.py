"""Jobs whose training is a toy (see benchmarks/toy_jobs), and workers that do them in this process."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil

from nightschool.config.recipe import Recipe
from nightschool.jobs.worker import Worker
from nightschool.jobs.worker_settings import WorkerSettings
from nightschool.store.home import Home
from nightschool.store.job_files import JobFiles
from nightschool.store.job_queue import Job, JobQueue, job_folder, new_id
from nightschool.store.runs import RunStore
from nightschool.work.stop import Stop

ROOT = Path(__file__).resolve().parents[2]


class Jobs:
    """A home with a queue, and what tests do with it."""

    def __init__(self, path):
        self.home = Home(path / "home").ensure()
        self.queue = JobQueue(self.home.database)
        self.said = []

    def submit(self, tenant="acme", name="bot", *, steps=20, rows=3, **values):
        """Queue a job as the service does: its data first, in its folder."""
        job_id = new_id()
        folder = job_folder(self.home, tenant, job_id)
        folder.mkdir(parents=True)
        lines = [{"query": f"question {k} of {job_id}?", "retrieved": f"answer {k}"} for k in range(rows)]
        (folder / "train.json").write_text(json.dumps(lines))
        plain = {"name": name, "base": "new:tiny", "data": [{"path": "train.json"}], "train": {"max_steps": steps}}
        recipe = Recipe(**plain | values).as_plain()
        return self.queue.submit(Job(job_id, tenant, name, recipe, str(folder), "api"))

    def worker(self, **settings):
        return RunningWorker(self, WorkerSettings(**settings))

    def drain(self, **settings):
        """Let a worker do everything that is queued."""
        Worker(self.home, WorkerSettings(**settings), stop=Stop(), say=self.said.append).serve(drain=True)

    def get(self, job):
        return self.queue.get(job.id)

    def run(self, job):
        return RunStore(self.home).get(self.get(job).run_id)

    def files(self, job):
        return JobFiles.of(self.home, job)

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)
        return found

    def until_training(self, job, step=1):
        """Wait until its run has come so far; returns the process that trains."""

        def trains():
            run_id = self.get(job).run_id
            status = None if run_id is None else RunStore(self.home).get(run_id).status
            rows = [] if status is None else (RunStore(self.home).get(run_id).path / "metrics.jsonl")
            enough = rows and rows.is_file() and len(rows.read_text().splitlines()) >= step
            return status.find_process() if status is not None and enough else None

        return self.until(trains)

    def process(self, job):
        return psutil.Process(self.files(job).process().pid)


class RunningWorker:
    """A worker in a thread, for as long as the block."""

    def __init__(self, jobs, settings):
        self.stop = Stop()
        worker = Worker(jobs.home, settings, stop=self.stop, say=jobs.said.append)
        self._thread = threading.Thread(target=worker.serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop.request("SIGTERM")
        self._thread.join(60)
        assert not self._thread.is_alive()


def lives(process):
    """Whether it runs; one whose parent never asked how it ended does not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def kill(process):
    """SIGKILL, and wait until it is gone."""
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while lives(process):
        assert time.monotonic() < deadline
        time.sleep(0.01)
