"""Runs on disk: one folder per training execution, with its recipe, status, metrics, events, log and checkpoints."""

from __future__ import annotations

import dataclasses
import io
import socket
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import psutil
from ruamel.yaml import YAML

from nightschool.errors import Conflict, Damaged, DiskFull, NotFound
from nightschool.events import EventLog, now
from nightschool.store.atomic import (
    PARTIAL,
    publish_directory,
    read_json,
    remove_folder,
    sweep_partials,
    write_json,
    write_text,
)
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.names import full_name, home_of, is_stamp, next_free_stamp, split_name, tenants_of
from nightschool.work.identity import ProcessIdentity

if TYPE_CHECKING:
    from nightschool.store.registry import Version

RunState = Literal["queued", "running", "completed", "failed", "cancelled", "interrupted"]
STATES: tuple[RunState, ...] = get_args(RunState)
FINAL_STATES: tuple[RunState, ...] = ("completed", "failed", "cancelled", "interrupted")
_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class RunStatus:
    """What status.json holds. `candidate` is the published version (`name@version`), `error` the message of a failure.

    `started_at` and `finished_at` are ISO 8601 in UTC. `pid` is the process that trains; when it began (seconds since
    1970) and its `host` are filled in with it. Where it `shares_process`, other runs train in that one too: no signal may
    be sent to it that is meant for this run alone; see `Run.request_stop`.
    """

    run_id: str
    name: str
    state: RunState
    step: int = 0
    steps_total: int | None = None
    pid: int | None = None
    started_at: str | None = None
    finished_at: str | None = None
    error: str | None = None
    candidate: str | None = None
    exit_code: int | None = None
    pid_created_at: float | None = None
    host: str | None = None
    shares_process: bool = False

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def process(self) -> ProcessIdentity | None:
        """The process that trains, or did last."""
        if self.pid is None or self.pid_created_at is None:
            return None
        return ProcessIdentity(self.host or socket.gethostname(), self.pid, self.pid_created_at)

    def find_process(self) -> psutil.Process | None:
        """That process itself, if it still runs on this machine."""
        return None if self.process is None else self.process.find()

    @property
    def process_lives(self) -> bool:
        """Whether that process still runs."""
        return self.process is not None and self.process.lives

    @property
    def effective_state(self) -> RunState:
        """The state, except that a `running` run whose process is dead was killed: it is `interrupted`."""
        return "interrupted" if self.state == "running" and not self.process_lives else self.state


@dataclass(frozen=True)
class Run:
    """One run's folder. Cheap to make; reads and writes happen in its properties and methods."""

    id: str
    path: Path
    home: Home

    @property
    def name(self) -> str:
        """The name under which its versions are published; with its tenant, unless that is the default one."""
        return self.id.rpartition("-")[0]

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def status_path(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock_path(self) -> Path:
        """Held by the process that trains this run, for as long as it does."""
        return self.path / "run.lock"

    @property
    def cycle_path(self) -> Path:
        """What one stage of its cycle leaves for the next, if a cycle began it."""
        return self.path / "cycle.json"

    @property
    def stop_path(self) -> Path:
        """Here lies what somebody asked of this run, and of no other that its process trains: to stop."""
        return self.path / "stop.json"

    @property
    def gate_path(self) -> Path:
        """Here lies how the comparison of its candidate ended, where a process made it that others share."""
        return self.path / "gate.json"

    def writing_lock_path(self, rank: int = 0) -> Path:
        """Held by whoever writes its checkpoints, which may go on for a while after the training process died."""
        return self.path / (f"writing-rank{rank}.lock" if rank else "writing.lock")

    @cached_property
    def events(self) -> EventLog:
        """The log to append to, each row with the id of this run; to read, use `read_events(events_path)`.

        Opened at first use, closed with this object.
        """
        log = EventLog(self.events_path, run_id=self.id)
        weakref.finalize(self, log.close)
        return log

    @property
    def status(self) -> RunStatus:
        """The present status. Raises NotFound if the run was removed, Damaged if status.json was altered."""
        content = read_json(self.status_path)
        known = {field.name for field in dataclasses.fields(RunStatus)}
        try:
            status = RunStatus(**{key: value for key, value in content.items() if key in known})
        except TypeError as error:
            raise Damaged(
                f"{self.status_path} lacks a field ({error}). Remove the run, or restore the file."
            ) from error
        if status.state not in STATES:
            raise Damaged(
                f"{self.status_path} has the state {status.state!r}, but a state is one of {', '.join(STATES)}. "
                f"Remove the run, or restore the file."
            )
        return status

    def update_status(self, **changes: Any) -> RunStatus:
        """Change fields of status.json, atomically, also against other processes; returns the new status.

        Takes two fsyncs, some milliseconds: call it when something happened, not in an inner loop. Setting the
        state to `running` sets `started_at` if it has none, a final state sets `finished_at`.

        Raises:
            TypeError: If a field does not exist.
            ValueError: If the state does not exist.
            DiskFull: If there is no room; the old status stays.
        """
        state = changes.get("state")
        if state is not None and state not in STATES:
            raise ValueError(f"there is no state {state!r}; states are {', '.join(STATES)}")
        with lock(self.path / "status.lock", f"the status of {self.id}", wait_seconds=_WAIT_SECONDS):
            present = self.status
            moment = now().isoformat()
            if state == "running":
                changes = {"started_at": present.started_at or moment, "finished_at": None, **changes}
            elif state in FINAL_STATES:
                changes = {"finished_at": moment, **changes}
            if changes.get("pid") is not None:
                found = ProcessIdentity.of(changes["pid"])
                began_at = None if found is None else found.created_at
                changes = {"pid_created_at": began_at, "host": socket.gethostname(), **changes}
            status = dataclasses.replace(present, **changes)
            write_json(self.status_path, dataclasses.asdict(status))
        return status

    def request_stop(self, reason: str) -> None:
        """Ask the run to save and stop, where it shares its process with others; it looks once a step.

        A run that has a process of its own gets a signal instead. Whoever starts the run anew calls `clear_stop` first.

        Raises:
            DiskFull: If there is no room; then nothing was asked.
        """
        write_json(self.stop_path, {"reason": reason})

    @property
    def stop_request(self) -> str | None:
        """The reason why the run is asked to stop; None if nobody asks."""
        return str(read_json(self.stop_path)["reason"]) if self.stop_path.exists() else None

    def clear_stop(self) -> None:
        """Forget that the run was asked to stop: it obeyed, or shall begin anew."""
        self.stop_path.unlink(missing_ok=True)

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values."""
        try:
            content = YAML(typ="safe", pure=True).load(self.recipe_path.read_bytes())
        except FileNotFoundError:
            raise NotFound(f"The run {self.id} does not exist: {self.recipe_path} is missing. List the runs.") from None
        if not isinstance(content, dict):
            raise Damaged(f"{self.recipe_path} holds no mapping. Remove the run, or restore the file.")
        return content


@dataclass(frozen=True)
class RunStore:
    """All runs of a home."""

    home: Home

    def create(self, recipe_plain: dict[str, Any], *, name: str, moment: datetime | None = None) -> Run:
        """Make the folder of a new run, in the state `queued`. Its id was never used before.

        Args:
            recipe_plain: The resolved recipe as plain values; kept as recipe.yaml.
            name: The name under which its versions will be published.
            moment: The time in its id; now when it is None.

        Raises:
            NameRefused: If the name may not become a path.
            DiskFull: If there is no room; then there is no run.
        """
        tenant, bare = split_name(name)
        name, runs = full_name(tenant, bare), home_of(self.home, tenant).runs
        with self._lock():
            sweep_partials(runs)
            removed = set(self._removed())
            stamp = next_free_stamp(
                moment or now(),
                lambda stamp: f"{name}-{stamp}" in removed or (runs / f"{bare}-{stamp}").exists(),
            )
            run = Run(f"{name}-{stamp}", runs / f"{bare}-{stamp}", self.home)
            with publish_directory(run.path) as folder:
                write_text(folder / run.recipe_path.name, recipe_yaml(recipe_plain))
                (folder / run.checkpoints_path.name).mkdir()
                write_json(
                    folder / run.status_path.name,
                    dataclasses.asdict(RunStatus(run_id=run.id, name=name, state="queued")),
                )
        return run

    def get(self, run_id: str) -> Run:
        """The run of this id.

        Raises:
            NameRefused: If the id could not be a file name.
            NotFound: If there is no such run; the message names some that exist.
        """
        run = self.at(run_id)
        if not run.status_path.is_file():
            newest = [run.id for run in self.ls()[:5]]
            exists = f"The newest are {', '.join(newest)}." if newest else "There are no runs yet."
            raise NotFound(f"There is no run {run_id!r} in {self.home.runs}. {exists}")
        return run

    def which_made(self, version: Version) -> Run | None:
        """The run that made a version; None if it was deleted, or nobody knows which it was.

        Raises:
            Damaged: If the version does not say it legibly.
        """
        try:
            return self.get(version.facts.run_id) if version.facts.run_id is not None else None
        except NotFound:
            return None

    def at(self, run_id: str) -> Run:
        """Where the run of this id lies, or would lie. Raises NameRefused if it could not be a path."""
        name, _, stamp = run_id.rpartition("-")
        tenant, bare = split_name(name if is_stamp(stamp) else run_id)
        folder = f"{bare}-{stamp}" if is_stamp(stamp) else bare
        return Run(full_name(tenant, folder), home_of(self.home, tenant).runs / folder, self.home)

    def containing(self, path: Path) -> Run | None:
        """The run in whose folder a path lies, in the home's own spelling; None if it lies in none."""
        for tenant in tenants_of(self.home):
            runs = home_of(self.home, tenant).runs
            if path.is_relative_to(runs) and path != runs:
                folder = path.relative_to(runs).parts[0]
                return Run(full_name(tenant, folder), runs / folder, self.home)
        return None

    def find(self, wanted: str | None) -> Run:
        """The run of this id; the newest with None or `latest`.

        Raises:
            NotFound: If there is no such run.
        """
        if wanted is not None and wanted != "latest":
            return self.get(wanted)
        runs = self.ls()
        if not runs:
            raise NotFound(f"There are no runs in {self.home.runs} yet. Start one with nightschool train RECIPE.")
        return runs[0]

    def ls(self, tenant: str | None = None) -> list[Run]:
        """The runs of one tenant, or of all, newest first."""
        runs = []
        for one in tenants_of(self.home) if tenant is None else [tenant]:
            for path in home_of(self.home, one).runs.glob("*-*"):
                _, _, stamp = path.name.rpartition("-")
                if not path.name.endswith(PARTIAL) and is_stamp(stamp) and (path / "status.json").is_file():
                    runs.append(Run(full_name(one, path.name), path, self.home))
        return sorted(runs, key=lambda run: (run.id.rpartition("-")[2], run.id), reverse=True)

    def remove(self, run_id: str) -> None:
        """Remove a run with its checkpoints; its id is never used again.

        Raises:
            NotFound: If there is no such run.
            Conflict: If it is running, in a process that lives.
        """
        with self._lock():
            run = self.get(run_id)
            status = run.status
            if status.state == "running" and status.process_lives:
                raise Conflict(f"The run {run_id} is running in process {status.pid}. Stop it first.")
            tombstones = {"run_ids": sorted({*self._removed(), run_id})}
            # The tombstone first: after a crash in between, the run is still whole and can be removed again. On a
            # full disk it is written afterwards, because removing is how room is made.
            try:
                write_json(self._removed_path, tombstones)
            except DiskFull:
                remove_folder(run.path)
                write_json(self._removed_path, tombstones)
            else:
                remove_folder(run.path)

    @property
    def _removed_path(self) -> Path:
        return self.home.runs / "removed.json"

    def _removed(self) -> list[str]:
        try:
            return list(read_json(self._removed_path).get("run_ids", []))
        except NotFound:
            return []

    def _lock(self) -> AbstractContextManager[None]:
        return lock(self.home.locks / "runs.lock", "the list of runs", wait_seconds=_WAIT_SECONDS)


def recipe_yaml(plain: dict[str, Any]) -> str:
    """A resolved recipe as the text of recipe.yaml."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(plain, text)
    return text.getvalue()
