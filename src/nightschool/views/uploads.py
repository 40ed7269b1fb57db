"""Uploads as people look at them: what the journal says, and what buckets hold."""

from __future__ import annotations

from typing import Any

from nightschool import uploads
from nightschool.errors import NightschoolError
from nightschool.events import now
from nightschool.remotes import open_remote
from nightschool.store import checkpoints
from nightschool.store.atomic import folder_bytes
from nightschool.store.home import Home
from nightschool.store.runs import Run
from nightschool.uploads.fetch import ls_remote

UPLOAD_STATES = {"queued": "waiting", "running": "uploading", "done": "uploaded", "failed": "failed"}
# An upload that is under way waits, to whoever asks whether it has arrived.
_WORDS = {"done": "uploaded", "failed": "failed", "queued": "waiting", "running": "waiting"}
_WORST = ("failed", "waiting", "uploaded")


def upload_states(home: Home, run: Run) -> dict[str, str]:
    """`uploaded`, `waiting` or `failed` by the name of a checkpoint of this run; the worst of several places."""
    states: dict[str, set[str]] = {}
    for row in _rows(home):
        if row.run_id == run.id:
            states.setdefault(row.name, set()).add(_WORDS[row.state])
    return {name: next(word for word in _WORST if word in words) for name, words in states.items()}


def local_checkpoints(home: Home, runs: list[Run]) -> list[dict[str, Any]]:
    """The checkpoints of runs with their sizes, and how far they are on their way to which places."""
    entered = uploads.Journal(home).ls()
    rows = []
    for run in runs:
        for point in checkpoints.ls(run):
            mine = [row for row in entered if row.path == str(point.path)]
            rows.append(
                {
                    "name": point.name,
                    "run_id": run.id,
                    "size_bytes": folder_bytes(point.path),
                    "upload": ", ".join(UPLOAD_STATES[row.state] for row in mine) or None,
                    "url": ", ".join(row.url for row in mine) or None,
                }
            )
    return rows


def upload_summary(home: Home) -> dict[str, Any] | None:
    """How many uploads wait and failed, and the bytes that are left; None where nothing was ever uploaded."""
    rows = _rows(home)
    if not rows:
        return None
    left = [row for row in rows if row.state != "done"]
    failed = [row for row in left if row.state == "failed"]
    return {
        "pending": len(left) - len(failed),
        "failed": len(failed),
        "pending_bytes": sum(max(0, row.size_bytes - row.sent_bytes) for row in left),
        "done": len(rows) - len(left),
        "error": failed[0].error if failed else None,
    }


def upload_overview(home: Home, rows: list[uploads.Upload], buckets: list[dict[str, Any]]) -> dict[str, Any]:
    """The journal at a glance: counts by state, what is not there yet, and what the buckets hold."""
    return {
        "uploader_runs": uploads.uploader_runs(home),
        "pending_bytes": sum(max(0, row.size_bytes - row.sent_bytes) for row in rows if row.state != "done"),
        "counts": {state: sum(row.state == state for row in rows) for state in UPLOAD_STATES},
        "uploads": [upload_row(row) for row in rows if row.state != "done"],
        "buckets": buckets,
    }


def upload_row(row: uploads.Upload) -> dict[str, Any]:
    """One upload as plain values; moments are in UTC."""
    return {
        "name": row.name,
        "run_id": row.run_id,
        "url": row.url,
        "state": row.state,
        "archive": row.archive,
        "size_bytes": row.size_bytes,
        "sent_bytes": row.sent_bytes,
        "attempts": row.attempts,
        "seconds_to_next_try": max(0.0, (row.next_try_at - now()).total_seconds()),
        "queued_at": f"{row.queued_at:%Y-%m-%d %H:%M:%S}",
        "finished_at": f"{row.finished_at:%Y-%m-%d %H:%M:%S}" if row.finished_at else None,
        "error_code": row.error_code,
        "error": row.error,
    }


def bucket_contents(url: str) -> dict[str, Any]:
    """What a bucket holds, or why it cannot be asked."""
    try:
        archives, folders = list_bucket(url)
        return {"url": url, "archives": archives, "checkpoints": folders, "error": None}
    except NightschoolError as error:
        return {"url": url, "archives": [], "checkpoints": [], "error": str(error)}


def list_bucket(url: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The archives and the checkpoint folders of a bucket, with their sizes."""
    remote = open_remote(url)
    sizes = {one.key: one.size_bytes for one in remote.list()}
    archives: list[dict[str, Any]] = []
    folders: list[dict[str, Any]] = []
    for located in ls_remote(remote):
        below = located.key if located.is_archive else located.key + "/"
        size_bytes = sum(size for key, size in sizes.items() if key.startswith(below))
        row = {"key": located.key, "run_id": located.run_id, "size_bytes": size_bytes}
        (archives if located.is_archive else folders).append(row)
    return archives, folders


def _rows(home: Home) -> list[uploads.Upload]:
    try:
        return uploads.Journal(home).ls()
    except NightschoolError:
        return []
