"""`nightschool jobs`: what waits to be trained, what trains, and what became of each."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nightschool.cli.formatting import duration, figure, moment
from nightschool.cli.output import Columns, Row, answer, answer_rows
from nightschool.cli.recipes import read_recipe
from nightschool.errors import NotFound
from nightschool.store.atomic import make_folder
from nightschool.store.home import Home
from nightschool.store.job_queue import Job, JobQueue, JobState, job_folder, new_id
from nightschool.store.names import split_name
from nightschool.store.runs import RunStore
from nightschool.units import printable
from nightschool.views.jobs import JobView, find_job, job_view, job_views
from nightschool.views.runs import POLL_SECONDS, without_colours


def submit(recipe: Path, /, *overrides: str) -> None:
    """Queue a recipe: a worker trains, examines and promotes it when its turn comes. Prints the id of the job.

    Args:
        recipe: A recipe file.
        overrides: Settings, as train.epochs=3.
    """
    home = Home.find().ensure()
    settings = read_recipe(recipe, overrides)
    tenant, name = split_name(settings.name)
    job = Job(new_id(), tenant, name, settings.as_plain(), str(Path.cwd()), "cli")
    make_folder(job_folder(home, tenant, job.id))
    JobQueue(home.database).submit(job)
    answer(
        dataclasses.asdict(job_view(home, job)),
        f"Queued {job.id}. Follow it with nightschool jobs logs -f {job.id}; nightschool worker does what is queued.",
        quiet=job.id,
    )


def ls(*, tenant: str | None = None, state: JobState | None = None, limit: int = 50) -> None:
    """List jobs, newest first, among them the runs that were started directly.

    Args:
        tenant: Only jobs of this tenant.
        state: Only jobs in this state.
        limit: At most this many.
    """
    home = Home.find()
    views = job_views(home, JobQueue(home.database), tenant)
    rows = [dataclasses.asdict(view) for view in views if state is None or view.state == state][:limit]
    columns: Columns = {
        "JOB": "id",
        "MODEL": lambda row: row["name"] if row["tenant"] == "default" else f"{row['tenant']}/{row['name']}",
        "STATE": "state",
        "STEP": lambda row: f"{row['step']}/{row['steps_total']}" if row["steps_total"] else row["step"],
        "LOSS": lambda row: figure(row["loss"]),
        "LEFT": lambda row: None if row["eta_seconds"] is None else duration(row["eta_seconds"]),
        "OUTCOME": "outcome",
        "CREATED": lambda row: moment(row["created_at"]),
    }
    answer_rows(rows, columns, none="No jobs yet. Queue one with nightschool jobs submit RECIPE.", quiet="id")


def show(job_id: str, /) -> None:
    """Show one job: its state, how far it has come, what became of it.

    Args:
        job_id: The job, or the run that it has become.
    """
    home = Home.find()
    view = find_job(home, JobQueue(home.database), job_id)
    answer(dataclasses.asdict(view), lambda: _text(view), quiet=view.state)


def _text(view: JobView) -> str:
    facts: Row = dataclasses.asdict(view)
    facts["progress"] = f"{view.progress:.0%}"
    facts["eta_seconds"] = None if view.eta_seconds is None else duration(view.eta_seconds)
    shown: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if value not in (None, {}, ()):
            text = ", ".join(value) if isinstance(value, tuple) else figure(value, 6)
            shown.append((key, moment(value) if key.endswith("_at") else text))
    return "\n".join(f"{key:<18} {value}" for key, value in shown)


def logs(job_id: str, /, *, follow: Annotated[bool, Parameter(name=["--follow", "-f"])] = False) -> None:
    """Print the log of a job, and that of its run after it.

    Args:
        job_id: The job, or the run that it has become.
        follow: Go on until the job ends.
    """
    home = Home.find()
    queue = JobQueue(home.database)
    view = find_job(home, queue, job_id)
    follower = _Follower()
    while True:
        ends = not follow or view.finished_at is not None or view.state in ("paused", "interrupted")
        if view.id != view.run_id:
            follower.print_new(job_folder(home, view.tenant, view.id) / "log.txt")
        if view.run_id is not None:
            follower.print_new(RunStore(home).at(view.run_id).log_path)
        if ends:
            break
        time.sleep(POLL_SECONDS)
        view = find_job(home, queue, job_id)
    if not follower.found:
        raise NotFound(f"The job {view.id} has no log yet. Its state is {view.state}.")


class _Follower:
    """Prints what was added to files since it looked last."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}
        self.found = False

    def print_new(self, path: Path) -> None:
        if not path.is_file():
            return
        self.found = True
        coloured = sys.stdout.isatty()
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            new = file.read()
        self._offsets[path] = self._offsets.get(path, 0) + len(new)
        text = new.decode(errors="replace")
        print(printable(text if coloured else without_colours(text), colours=coloured), end="", flush=True)


def cancel(job_id: str, /) -> None:
    """End a job for good: one that waits at once, one that runs as soon as its process has ended.

    Args:
        job_id: The job.
    """
    _change(job_id, "cancel")


def pause(job_id: str, /) -> None:
    """Let a job wait until it is resumed. One that runs finishes its step and saves first.

    Args:
        job_id: The job.
    """
    _change(job_id, "pause")


def resume(job_id: str, /) -> None:
    """Let a paused job go on from where it stopped.

    Args:
        job_id: The job.
    """
    _change(job_id, "resume")


def _change(job_id: str, verb: str) -> None:
    home = Home.find()
    queue = JobQueue(home.database)
    change = {"cancel": queue.request_cancel, "pause": queue.pause, "resume": queue.resume}[verb]
    job = change(job_id)
    words = {
        "cancelling": "is being cancelled: its worker ends it",
        "pausing": "is being paused: it saves first",
        "running": "goes on",
    }
    text = f"{job.id} {words.get(job.phase, 'is ' + job.state)}."
    answer(dataclasses.asdict(job_view(home, job)), text, quiet=job.phase)
