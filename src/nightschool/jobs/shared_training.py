"""The training of several runs in one process on one base, each awaited by whoever does its cycle."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nightschool.errors import NightschoolError
from nightschool.jobs.launch import (
    INTERRUPTED_EXIT_CODE,
    CycleContext,
    Trainer,
    run_training,
    settle_status,
    start_process,
)
from nightschool.jobs.outcome import root_of
from nightschool.store.atomic import make_folder, write_json
from nightschool.store.home import Home
from nightschool.store.locks import is_held
from nightschool.store.runs import Run
from nightschool.work.processes import command

_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class _Waiting:
    """A run that is ready to be trained, and the checkpoint from which it goes on."""

    run: Run
    resume: str | None


class SharedTraining:
    """Starts one process for the runs of all members, as soon as each of them has come, or will not come.

    A member that comes too late, or alone, or whose process ended with an error that is not its own, trains by itself.
    """

    def __init__(self, home: Home, folder: Path, members: Sequence[str]) -> None:
        self._home = home
        self._folder = folder
        self._changed = threading.Condition()
        self._coming = set(members)
        self._waiting: dict[str, _Waiting] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = False
        self._by_itself = threading.Lock()

    def trainer_of(self, member: str) -> Trainer:
        """What trains the run of a member in place of `run_training`."""
        return partial(self._train, member)

    def leave(self, member: str) -> None:
        """Say that a member will not come, or has come: the others need not wait for it."""
        with self._changed:
            self._coming.discard(member)
            self._begin_if_all_are_there()

    def _train(self, member: str, run: Run, around: CycleContext, *, resume: str | None) -> int:
        run.clear_stop()
        # Final states are those of an earlier process until then.
        run.update_status(state="queued", exit_code=None, error=None)
        with self._changed:
            if not self._begun:
                self._waiting[member] = _Waiting(run, resume)
                self._coming.discard(member)
                self._begin_if_all_are_there()
            while not self._begun and not around.stop.requested:
                self._changed.wait(_LOOK_SECONDS)
            is_alone = member not in self._waiting or (self._begun and self._process is None)
            if not self._begun:
                del self._waiting[member]
                settle_status(run, INTERRUPTED_EXIT_CODE, stopped=True)
                return INTERRUPTED_EXIT_CODE
        code = None if is_alone else self._wait_for(run, around)
        return self._train_by_itself(run, around, resume if is_alone else "latest") if code is None else code

    def _begin_if_all_are_there(self) -> None:
        """Start the process; the caller holds the lock. One run alone needs none that is shared."""
        if self._begun or self._coming or not self._waiting:
            return
        if len(self._waiting) > 1:
            members = [
                {"run": one.run.id, "resume": one.resume, "root": str(root_of(one.run))}
                for one in self._waiting.values()
            ]
            self._process = self._started(members)
        self._begun = True
        self._changed.notify_all()

    def _started(self, members: Sequence[Mapping[str, str | None]]) -> subprocess.Popen[bytes] | None:
        """The process; None if it cannot be started, so that each run says by itself why it cannot."""
        path = self._folder / f"members-{os.getpid()}.json"
        line = command("train-together", "--home", str(self._home.path), "--members", str(path))
        try:
            make_folder(self._folder)
            write_json(path, members)
            return start_process(line, log=self._folder / "log.txt", machine="shared", directory=self._folder)
        except (NightschoolError, OSError):
            return None

    def _wait_for(self, run: Run, around: CycleContext) -> int | None:
        """The exit code of a run that shares the process; None if the process ended, and did not say how the run did."""
        assert self._process is not None
        while not _has_ended(run):
            process_code = self._process.poll()
            if process_code is not None and not _has_ended(run):
                if process_code >= 0 and process_code != INTERRUPTED_EXIT_CODE and not around.stop.requested:
                    return None
                settle_status(run, process_code, stopped=around.stop.requested)
                return process_code if process_code < 0 else INTERRUPTED_EXIT_CODE
            if around.stop.requested and run.stop_request is None:
                run.request_stop(around.stop.reason or "a request")
            if around.ahead is not None:
                around.ahead.look()
            time.sleep(_LOOK_SECONDS)
        code = run.status.exit_code
        return 1 if code is None else code

    def _train_by_itself(self, run: Run, around: CycleContext, resume: str | None) -> int:
        """Train as any run is trained, one after the other, when the shared process is gone."""
        while self._process is not None and self._process.poll() is None and not around.stop.requested:
            time.sleep(_LOOK_SECONDS)
        with self._by_itself:
            around.stop.check("training began")
            return run_training(run, around, resume=resume)


def _has_ended(run: Run) -> bool:
    return run.status.is_final and not is_held(run.lock_path)
