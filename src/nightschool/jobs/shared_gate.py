"""The gate of runs that train together: one process that has their base in memory examines their candidates in turn.

A gate of its own for each would start, load the base and ask the champion again and again, one after the other, because two
bases may not fit. So the members of a group name their runs to one process as the ends of their trainings come near, and
then their candidates. Whoever finds no such process begins a gate of its own.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nightschool.errors import Locked
from nightschool.jobs.gate_ahead import LOCK, end_process
from nightschool.jobs.head_start import HeadStart
from nightschool.jobs.launch import INTERRUPTED_EXIT_CODE, CycleContext, start_process
from nightschool.jobs.outcome import root_of
from nightschool.store.atomic import make_folder, read_json
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.registry import Registry
from nightschool.store.runs import Run
from nightschool.work.processes import command

_WAIT_SECONDS = 0.05


class SharedGate:
    """At most one process, which lives while one of the runs expects it. Its methods may be called from any thread.

    Args:
        home: Where the runs are.
        folder: The folder of the group, for the log of the process.
    """

    def __init__(self, home: Home, folder: Path) -> None:
        self._home = home
        self._folder = folder
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._expecting: set[str] = set()
        self._turn = contextlib.ExitStack()

    @contextmanager
    def of(self, run: Run, around: CycleContext) -> Iterator[MemberGate]:
        """What one run sees of it, until its cycle has ended."""
        try:
            yield MemberGate(self, run, around)
        finally:
            self.leave(run)

    def expect(self, run: Run, champion: str | None) -> None:
        """Have the champion asked of a run whose candidate will soon be there; begins the process, unless another waits."""
        with self._guard:
            if run.id in self._expecting or not self._begun():
                return
            self._expecting.add(run.id)
            self._say({"run": run.id, "root": str(root_of(run)), "champion": champion})

    def examine(self, run: Run, candidate: str, champion: str | None, around: CycleContext) -> int | None:
        """Compare the two; the exit code as of a process that does only that. None if no process answers."""
        run.gate_path.unlink(missing_ok=True)
        with self._guard:
            process = self._process
            told = {"run": run.id, "root": str(root_of(run)), "candidate": candidate, "champion": champion}
            if process is None or not self._say(told):
                return None
            self._expecting.add(run.id)
        while not run.gate_path.exists():
            if around.stop.wait(_WAIT_SECONDS):
                return INTERRUPTED_EXIT_CODE
            is_lost = process.poll() is not None or not run.path.is_dir()
            if is_lost and not run.gate_path.exists():
                return None
        ended = read_json(run.gate_path)
        if ended["error"] is not None and around.on_line is not None:
            around.on_line(ended["error"])
        return int(ended["exit_code"])

    def leave(self, run: Run) -> None:
        """Say that a run expects nothing any more; the process ends with the last one."""
        with self._guard:
            self._expecting.discard(run.id)
            if not self._expecting:
                self._end()

    def _begun(self) -> bool:
        """Whether the process is there, started if need be; the guard is held."""
        if self._process is not None and self._process.poll() is None:
            return True
        self._end()
        try:
            self._turn.enter_context(lock(self._home.locks / LOCK, "a gate that waits for its candidate"))
        except Locked:  # by another run's: these gates begin when they are needed
            return False
        make_folder(self._folder)
        self._process = start_process(
            command("compare-in-turn", "--home", str(self._home.path)),
            log=self._folder / "log.txt",
            machine="shared",
            directory=self._folder,
            is_told=True,
        )
        return True

    def _say(self, told: dict[str, str | None]) -> bool:
        """Write a line to the process; False if it has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return False
        return True

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and a line was left
                process.stdin.close()
            end_process(process)
        self._turn.close()


class MemberGate(HeadStart):
    """The gate of a group, as the cycle of one of its runs sees it."""

    def __init__(self, shared: SharedGate, run: Run, around: CycleContext) -> None:
        super().__init__(run, around)
        self._shared = shared

    def _near(self) -> None:
        champion = Registry(self._run.home).champion(self._run.name)
        self._shared.expect(self._run, None if champion is None else champion.ref)

    def _far(self) -> None:
        self._shared.leave(self._run)

    def examine(self, candidate: str, champion: str | None, around: CycleContext) -> int | None:
        """Let the process compare the two; None if there is none."""
        return self._shared.examine(self._run, candidate, champion, around)
