"""Uploads: a checkpoint that was committed is entered in a journal, and a process of its own brings it to its place.

    uploads.after_commit(run, path)      what a writer calls; does what the run's recipe says
    uploads.is_pending(home, path)       what retention asks before it removes anything
    Journal(home)                        what is not uploaded yet, and what was

The uploader (`python -m nightschool.jobs.uploader`) outlives the trainer. A failed upload never stops training.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import ValidationError

from nightschool.config import checkpoints as config
from nightschool.errors import Damaged, NightschoolError, NotFound
from nightschool.remotes.address import parse_url
from nightschool.store import checkpoints
from nightschool.store.atomic import make_folder
from nightschool.store.home import Home
from nightschool.store.locks import is_held
from nightschool.store.runs import Run, RunStore
from nightschool.units import format_bytes
from nightschool.uploads.journal import Journal, Upload, digest_of
from nightschool.uploads.push import push_until_done
from nightschool.work.processes import PROCESSES, command

__all__ = [
    "Journal",
    "Upload",
    "after_commit",
    "ensure_uploader",
    "is_pending",
    "push_now",
    "reconcile",
    "restart_uploader",
    "settings_of",
    "uploader_lock_path",
    "uploader_log_path",
    "uploader_runs",
    "wait_at_stop",
    "wait_for_room",
]

# So long a trainer without a background uploader stands still for one checkpoint; the journal keeps the rest.
GIVE_UP_SECONDS = 600.0
_POLL_SECONDS = 1.0
_END_SECONDS = 10.0

_NAMED = re.compile(rb"\bupload:(?!\s*(null\b|url:\s*null\b))")

_started: list[subprocess.Popen[bytes]] = []


def settings_of(run: Run) -> config.Upload | None:
    """What the run's recipe says of uploads; None if nothing is uploaded. Raises Damaged if it says nothing of sense."""
    # Reading YAML takes milliseconds a run, and most runs upload nothing.
    if _NAMED.search(run.recipe_path.read_bytes()) is None:
        return None
    try:
        settings = config.Checkpoints.model_validate(run.recipe().get("checkpoints") or {}).upload
    except ValidationError as error:
        raise Damaged(
            f"{run.recipe_path} has wrong checkpoints: {error.errors()[0]['msg']}. Restore the file, or remove the run."
        ) from error
    return settings if settings.url else None


def after_commit(run: Run, checkpoint: Path, *, say: Callable[[str], None]) -> None:
    """Do what the recipe says of uploads with a checkpoint that was just committed. Call it before retention.

    With `background`, that is one row in the journal, and a process that is started if none runs. Otherwise the
    checkpoint is uploaded before this returns, or, when that fails for too long, left to the journal. Never raises
    for what is wrong with an upload: `say` gets it.
    """
    try:
        settings = settings_of(run)
        if settings is None:
            return
        if settings.background:
            Journal(run.home).enqueue(checkpoint, settings)
            ensure_uploader(run.home)
            say(f"Queued {checkpoint.name} for background upload")
            return
        result = push_now(run.home, checkpoint, settings, say=say)
        if result.state != "done":
            say(f"Not uploaded {checkpoint.name}: {result.error}")
    except (NightschoolError, OSError) as error:
        say(f"Not uploaded {checkpoint.name}: {error}")


def is_pending(home: Home, path: Path) -> bool:
    """Whether a checkpoint must be uploaded and is not yet: then retention leaves it.

    Also true when the journal cannot be read, or has no row yet although the recipe of the run wants one: a doubt
    never costs the last copy.
    """
    try:
        present = digest_of(path)
        rows = Journal(home).ls(path=path)
    except FileNotFoundError:
        return False
    except NightschoolError:
        return True
    if any(row.state != "done" or row.digest != present for row in rows):
        return True
    try:
        run = RunStore(home).containing(path)
        settings = None if run is None else settings_of(run)
        return settings is not None and str(parse_url(settings.url or "")) not in {row.url for row in rows}
    except FileNotFoundError:
        return False
    except NightschoolError:
        return True


def wait_for_room(
    home: Home,
    most_bytes: int,
    *,
    say: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
    give_up_seconds: float = GIVE_UP_SECONDS,
) -> bool:
    """Wait until no more than that is pending: back-pressure for who makes checkpoints faster than they leave.

    Returns False if the time is over, or `stop` said so.
    """
    deadline = time.monotonic() + give_up_seconds
    journal, told = Journal(home), False
    # What has failed waits for the user; to wait for it here would stop the run for nothing.
    while (pending := journal.bytes_left(("queued", "running"))) > most_bytes:
        if stop() or time.monotonic() > deadline:
            return False
        ensure_uploader(home)
        if not told:
            say(f"Waiting for uploads: {format_bytes(pending)} are pending, at most {format_bytes(most_bytes)} may be")
            told = True
        time.sleep(_POLL_SECONDS)
    return True


def wait_at_stop(run: Run, *, say: Callable[[str], None]) -> bool:
    """Wait as long as the recipe allows for the uploads of a run that was asked to stop.

    Where the machine goes away with the run, this is the last chance; elsewhere the uploader goes on by itself.
    Returns whether nothing is left. Never raises for what is wrong with an upload.
    """
    try:
        settings = settings_of(run)
        if settings is None:
            return True
        deadline = time.monotonic() + settings.wait_at_stop
        journal, told = Journal(run.home), False
        while True:
            rows = [row for row in journal.ls() if row.run_id == run.id and row.state in ("queued", "running")]
            if not rows:
                return not any(row.run_id == run.id and row.state == "failed" for row in journal.ls())
            if time.monotonic() > deadline:
                say(f"{len(rows)} uploads are left; they go on in the background, or with nightschool uploads retry")
                return False
            if not told:
                say(f"Waiting up to {settings.wait_at_stop:g} s for {len(rows)} uploads")
                told = True
            ensure_uploader(run.home)
            time.sleep(min(_POLL_SECONDS, 0.2))
    except (NightschoolError, OSError) as error:
        say(f"Not waiting for uploads: {error}")
        return False


def reconcile(home: Home) -> list[Upload]:
    """Enter the committed checkpoints that should be in the journal and are not: a crash came in between.

    What belonged to runs that were removed leaves the journal.

    Returns:
        What was entered.
    """
    entered = []
    journal = Journal(home)
    rows = journal.ls()
    journal.forget(row.id for row in rows if not row.folder.exists() and not row.folder.parent.parent.exists())
    known = {(row.path, row.url): row.digest for row in rows}
    for run in RunStore(home).ls():
        try:
            settings = settings_of(run)
            if settings is None:
                continue
            url = str(parse_url(settings.url or ""))
            entered += [
                journal.enqueue(point.path, settings)
                for point in checkpoints.ls(run)
                if known.get((str(point.path), url)) != digest_of(point.path)
            ]
        except (NotFound, Damaged, FileNotFoundError):
            continue  # removed meanwhile, or damaged: there is nothing that could be uploaded
    return entered


def push_now(
    home: Home,
    checkpoint: Path,
    settings: config.Upload,
    *,
    say: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
    give_up_seconds: float = GIVE_UP_SECONDS,
) -> Upload:
    """Upload a checkpoint in this process, and return when it is done, failed, or the time is over.

    Whatever happens, it is in the journal: an uploader goes on with what is not done.

    Raises:
        NotFound, Damaged, UsageError: As `Journal.enqueue` does.
        Interrupted: If `stop` says so.
    """
    journal = Journal(home)
    upload = journal.enqueue(checkpoint, settings)
    return push_until_done(journal, upload, say=say, stop=stop, give_up_seconds=give_up_seconds)


def uploader_lock_path(home: Home) -> Path:
    """Held by the one uploader of a home for as long as it lives."""
    return home.locks / "uploader.lock"


def uploader_log_path(home: Home) -> Path:
    """What the uploader says."""
    return home.path / "uploader.log"


def uploader_runs(home: Home) -> bool:
    """Whether a home has a living uploader."""
    return is_held(uploader_lock_path(home))


def ensure_uploader(home: Home) -> int | None:
    """Start the uploader of a home unless one runs: detached, so that it outlives this process. Returns its pid.

    Call it after the row is in the journal: an uploader looks once more between giving up its lock and ending.
    """
    _started[:] = [process for process in _started if process.poll() is None]
    if uploader_runs(home):
        return None
    make_folder(home.path)
    with uploader_log_path(home).open("ab") as log:
        process = subprocess.Popen(
            command("upload", "--home", str(home.path)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _started.append(process)
    return process.pid


def restart_uploader(home: Home) -> int | None:
    """Start the uploader of a home anew, with the environment of this process: it may have better credentials.

    What the old one was at goes on in the new one. Returns the new pid.
    """
    # There may be none, or it is at something that cannot be left; then it stays.
    with suppress(OSError, ValueError, psutil.Error):
        old = psutil.Process(int(uploader_lock_path(home).read_text()))
        # The number may be another program's by now.
        if PROCESSES["upload"] in old.cmdline():
            old.terminate()
            old.wait(_END_SECONDS)
    return ensure_uploader(home)
