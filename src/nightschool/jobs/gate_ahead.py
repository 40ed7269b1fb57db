"""The gate's process, started while the run still trains.

Most of what a gate takes is there before the candidate: the interpreter, the libraries, the base, and what the champion
answers. So its process begins early and waits for the candidate on its standard input. What it knows beforehand is only
used if the very same would be asked afterwards (`engine/comparison.py`), so the verdict is the one of a process that starts
late. It ends when its input does: with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from types import TracebackType

from nightschool.errors import Locked
from nightschool.jobs.head_start import HeadStart
from nightschool.jobs.launch import CycleContext, size_of, start_process, wait_for
from nightschool.jobs.outcome import root_of
from nightschool.store.locks import lock
from nightschool.store.registry import Registry
from nightschool.store.runs import Run
from nightschool.work.processes import command

_END_SECONDS = 10.0
LOCK = "gate-ahead.lock"


class GateAhead(HeadStart):
    """At most one process that waits for the candidate of `run`; at most one of a home at a time. A context manager."""

    def __init__(self, run: Run, around: CycleContext) -> None:
        super().__init__(run, around)
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = contextlib.ExitStack()

    def tell(self, candidate: str, champion: str | None) -> subprocess.Popen[bytes] | None:
        """Name the candidate to the process that waits, and hand it over; None if there is none, or it has ended."""
        process, self._process = self._process, None
        self._turn.close()
        if process is None or process.stdin is None:
            return None
        try:
            with process.stdin as stdin:
                stdin.write(json.dumps({"candidate": candidate, "champion": champion}).encode() + b"\n")
        except BrokenPipeError:
            end_process(process)
            return None
        return process

    def examine(self, candidate: str, champion: str | None, around: CycleContext) -> int | None:
        """Let the process that waits compare the two; its exit code, or None if there is none."""
        log, from_byte = self._run.log_path, size_of(self._run.log_path)
        waiting = self.tell(candidate, champion)
        if waiting is None:
            return None
        return wait_for(waiting, log=log, from_byte=from_byte, stop=around.stop, on_line=around.on_line)

    def close(self) -> None:
        """End the process, if it waits; nobody will name a candidate."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            end_process(process)
        self._turn.close()

    def _far(self) -> None:
        self.close()

    def _near(self) -> None:
        if self._process is not None:
            return
        try:
            self._turn.enter_context(lock(self._run.home.locks / LOCK, "a gate that waits for its candidate"))
        except Locked:  # by another run's: this one's gate begins when it is needed
            return
        champion = Registry(self._run.home).champion(self._run.name)
        compared = () if champion is None else ("--champion", champion.ref)
        line = command("compare", "--home", str(self._run.home.path), "--run", self._run.id, *compared, "--ahead")
        self._process = start_process(
            line, log=self._run.log_path, machine=self._around.machine, directory=root_of(self._run), is_told=True
        )

    def __enter__(self) -> GateAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has ended whose input is closed."""
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
