"""`python -m nightschool.jobs.on_node --folder F --grace-seconds S -- COMMAND …`: a process of a job on a node of a cluster.

Runs the command as a worker would on its own machine, with its output in the job's log. It stands between Ray and the command
because Ray stops a whole tree of processes at once, so that none could save in order; and because a node that Ray has lost may
go on working. So whoever wants the job to end writes a file into its folder, and nothing of it outlives Ray's part of the node.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from nightschool.jobs.local_process import LocalProcess
from nightschool.jobs.processes import how_it_ended
from nightschool.store.job_files import JobFiles

_POLL_SECONDS = 0.2
_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str] | None = None) -> int:
    """Run the command to its end. 0 if it ended by itself, however: its folder tells how. 1 if it was killed."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.jobs.on_node", description="Run a part of a job.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--grace-seconds", type=float, required=True)
    parser.add_argument("command_line", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    started_by = os.getppid()
    os.setsid()  # out of the group that is killed at once when Ray is
    signal.signal(signal.SIGTERM, _ignore)  # whoever sends it sends it to the command as well
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed command has started becomes ours
    files = JobFiles(given.folder)
    if files.node_stop_path.exists():  # it was cancelled while it waited for a node
        return 0
    exit_code = _run(given.command_line[1:], files, started_by, given.grace_seconds)
    if exit_code >= 0:
        return 0
    print(how_it_ended(exit_code))  # noqa: T201 - Ray tells the worker
    _end_what_is_left(given.grace_seconds)
    return 1


def _run(command_line: Sequence[str], files: JobFiles, started_by: int, grace_seconds: float) -> int:
    process = LocalProcess.start(command_line, log=files.log_path, directory=files.path)
    stopped_at: float | None = None
    while (exit_code := process.exit_code) is None:
        if stopped_at is None and (files.node_stop_path.exists() or os.getppid() != started_by):
            stopped_at = time.monotonic()
            process.terminate()
        if stopped_at is not None and time.monotonic() - stopped_at > grace_seconds:
            process.kill()
        time.sleep(_POLL_SECONDS)
    return exit_code


def _end_what_is_left(grace_seconds: float) -> None:
    """Let a trainer whose job was killed save and end: nobody could reach it here any more."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        process.terminate()
    for process in psutil.wait_procs(left, timeout=grace_seconds)[1]:
        process.kill()


def _ignore(*_: object) -> None:
    return


if __name__ == "__main__":
    sys.exit(main())
