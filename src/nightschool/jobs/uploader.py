"""`python -m nightschool.jobs.uploader --home H [--drain]`: brings what the journal holds to its place.

One process per home, detached from who started it. It ends when nothing is left to do for a while; whoever enters
something starts it again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nightschool import uploads
from nightschool.errors import Interrupted, Locked, NightschoolError
from nightschool.events import EventLog, now
from nightschool.remotes import TIMEOUT_SECONDS
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.runs import RunStore
from nightschool.units import format_bytes, printable
from nightschool.uploads.journal import Journal, Upload
from nightschool.uploads.push import attempt
from nightschool.work.stop import Stop

# Training comes first.
_NICENESS = 10
_IDLE_SECONDS = 60.0
_POLL_SECONDS = 1.0
# Whoever looks whether an uploader runs holds its lock for a moment.
_LOCK_SECONDS = 2.0
_PAUSE_AFTER_FAULT_SECONDS = 5.0

Say = Callable[[str], None]


def main(arguments: list[str] | None = None) -> int:
    """Upload until there is nothing to do. Prints into the log of the uploads."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.jobs.uploader", description="Upload what is due.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--drain", action="store_true", help="end as soon as nothing is queued; 1 if something failed")
    parser.add_argument("--idle-seconds", type=float, default=_IDLE_SECONDS)
    parser.add_argument("--timeout-seconds", type=float, default=TIMEOUT_SECONDS)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    idle_seconds = 0.0 if given.drain else given.idle_seconds
    try:
        with Stop() as stop:
            return serve(
                Home(given.home), idle_seconds=idle_seconds, timeout_seconds=given.timeout_seconds, stop=stop, say=_say
            )
    except Locked as error:
        if not given.drain:
            return 0  # several were started at once, and one is enough
        _say(str(error))
        return error.exit_code
    except NightschoolError as error:
        _say(f"error: {error}")
        return error.exit_code


def serve(home: Home, *, idle_seconds: float, timeout_seconds: float, stop: Stop, say: Say) -> int:
    """Upload whatever is due, until nothing is queued for `idle_seconds`.

    Returns:
        0, or 1 if an upload has failed for good.

    Raises:
        Locked: If the home has another uploader.
        Interrupted: If `stop` says so.
    """
    while True:
        with lock(uploads.uploader_lock_path(home), "the uploads of this home", wait_seconds=_LOCK_SECONDS):
            _work(home, idle_seconds=idle_seconds, timeout_seconds=timeout_seconds, stop=stop, say=say)
        if not home.path.is_dir():
            return 0
        # Something may have been entered while we still held the lock, by somebody who took us for alive.
        journal = Journal(home)
        if journal.seconds_to_next() is None:
            return 1 if journal.ls(states=("failed",)) else 0


def _work(home: Home, *, idle_seconds: float, timeout_seconds: float, stop: Stop, say: Say) -> None:
    for found in uploads.reconcile(home):
        say(f"Found {found.name} of {found.run_id}, which was not in the journal")
    idle_since = time.monotonic()
    journal = Journal(home)
    while True:
        if stop.requested:
            raise Interrupted("The uploader was stopped. Started again, it goes on where it was.")
        try:
            upload = journal.claim()
            if upload is not None:
                started = time.monotonic()
                ended = attempt(journal, upload, say=say, stop=lambda: stop.requested, timeout_seconds=timeout_seconds)
                idle_since = time.monotonic()
                _tell(home, ended, idle_since - started, say)
                continue
            due = journal.seconds_to_next()
        except Interrupted:
            raise
        except NightschoolError as error:  # of the database: full, or locked by somebody for too long
            say(f"error: {error}")
            stop.wait(_PAUSE_AFTER_FAULT_SECONDS)
            continue
        if due is None and time.monotonic() - idle_since >= idle_seconds:
            return
        if not home.path.is_dir():
            say(f"{home.path} was removed; there is nothing left to upload")
            return
        # What is due and could not be taken is at work elsewhere.
        stop.wait(min(_POLL_SECONDS, due + 0.01) if due else _POLL_SECONDS)


def _tell(home: Home, upload: Upload, seconds: float, say: Say) -> None:
    """Say how an attempt ended, here and in the events of the run."""
    facts: dict[str, Any]
    if upload.state == "done":
        say(f"Uploaded {upload.name} of {upload.run_id}: {format_bytes(upload.size_bytes)} in {seconds:.1f} s")
        event, facts = "uploaded", {"seconds": seconds, "size_bytes": upload.size_bytes}
    elif upload.error is not None:
        again = "waits for nightschool uploads retry" if upload.state == "failed" else "is tried again"
        say(f"Not uploaded {upload.name} of {upload.run_id} (attempt {upload.attempts}; it {again}): {upload.error}")
        event, facts = "upload_failed", {"error": upload.error, "attempts": upload.attempts, "state": upload.state}
    else:
        return
    run = RunStore(home).at(upload.run_id)
    if run.status_path.is_file():
        with contextlib.suppress(OSError):  # the journal has it; the disk may be full
            log = EventLog(run.events_path, run_id=run.id)
            log.write(event, name=upload.name, url=upload.url, **facts)
            log.close()


def _say(text: str) -> None:
    print(f"{now():%Y-%m-%d %H:%M:%S} {printable(text)}", flush=True)  # noqa: T201 - stdout is the log


if __name__ == "__main__":
    sys.exit(main())
