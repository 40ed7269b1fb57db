"""A worker as a process beside a server: it ends with it, however that ends, and is started again if it dies alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nightschool.jobs.launch import child_environment
from nightschool.jobs.worker_settings import WorkerSettings
from nightschool.store.home import Home
from nightschool.work.backoff import BackOff
from nightschool.work.processes import command

_BACK_OFF = BackOff(first_seconds=1.0, longest_seconds=60.0)


@contextmanager
def worker_beside(home: Home) -> Iterator[None]:
    """Have a worker for the time of the block; at its end the jobs save, and wait in the queue. It logs to stderr.

    Raises:
        UsageError: If the environment has settings of a worker that make no sense.
    """
    WorkerSettings.from_env()
    beside = _Beside(home)
    thread = threading.Thread(target=beside.keep, name="worker-beside", daemon=True)
    thread.start()
    try:
        yield
    finally:
        beside.end()
        thread.join()


class _Beside:
    def __init__(self, home: Home) -> None:
        self._line = command("worker", "--home", str(home.path), "--until-eof")
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self) -> None:
        """Start it, and again after each death, until `end`."""
        deaths = 0
        while (process := self._start()) is not None:
            process.wait()
            self._close_stdin()
            deaths += 1
            self._ended.wait(_BACK_OFF.pause_seconds(deaths))

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._guard:
            if self._ended.is_set():
                return None
            self._process = subprocess.Popen(
                self._line,
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno(),
                env=child_environment("shared"),
                start_new_session=True,
            )
            return self._process

    def end(self) -> None:
        """The worker sees its stdin end, as it does when this process is killed."""
        self._ended.set()
        self._close_stdin()

    def _close_stdin(self) -> None:
        with self._guard:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()
