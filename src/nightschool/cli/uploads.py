"""`nightschool uploads`: what is in buckets, what is on its way, and what did not get there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nightschool import uploads
from nightschool.cli.lookup import find_checkpoint
from nightschool.cli.output import Columns, Row, answer, answer_rows, note, table
from nightschool.cli.recipes import read_recipe
from nightschool.config.checkpoints import Upload
from nightschool.errors import NotFound, UsageError
from nightschool.remotes import parse_url
from nightschool.store import checkpoints
from nightschool.store.atomic import folder_bytes
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.runs import Run, RunStore
from nightschool.units import format_bytes, parse_bytes
from nightschool.uploads.fetch import fetch_checkpoint
from nightschool.views.uploads import (
    UPLOAD_STATES,
    bucket_contents,
    list_bucket,
    local_checkpoints,
    upload_overview,
    upload_row,
)


def status(*, at: str | None = None, config: Path | None = None, local: bool = False) -> None:
    """What is pending, what failed and why, and which archives and checkpoint folders each bucket holds.

    Args:
        at: Look into this bucket; without it, into those that the journal names.
        config: Look into the bucket of this recipe.
        local: Ask no bucket, only the journal.
    """
    home = Home.find()
    rows = uploads.Journal(home).ls()
    places = _places(at, config) or sorted({row.url for row in rows})
    buckets = [] if local else [bucket_contents(url) for url in places]
    data = upload_overview(home, rows, buckets)
    answer(data, lambda: _status_text(data), quiet=lambda: "\n".join(row["name"] for row in data["uploads"]))


def _status_text(data: dict[str, Any]) -> str:
    counts = data["counts"]
    lines = [
        f"{counts['done']} uploaded, {counts['running']} uploading, {counts['queued']} waiting, "
        f"{counts['failed']} failed; {_mb(data['pending_bytes'])} MB pending; "
        f"the uploader {'runs' if data['uploader_runs'] else 'does not run'}"
    ]
    if data["uploads"]:
        columns = ("CHECKPOINT", "RUN", "TO", "STATE", "SENT MB", "OF MB", "ATTEMPTS", "NEXT TRY")
        lines += ["", table(columns, [_pending_line(row) for row in data["uploads"]])]
        lines += [f"{row['name']}: {row['error']}" for row in data["uploads"] if row["error"]]
        if counts["failed"]:
            lines.append("Failed uploads wait; when the cause is mended: nightschool uploads retry")
    for bucket in data["buckets"]:
        lines += ["", f"{bucket['url']}:"]
        if bucket["error"]:
            lines.append(f"  {bucket['error']}")
            continue
        for kind, what in (("archives", "archives"), ("checkpoints", "checkpoint folders")):
            lines.append(f"  {len(bucket[kind])} {what}")
            lines += [f"    {one['key']}  {_mb(one['size_bytes'])} MB" for one in bucket[kind]]
    return "\n".join(lines)


def _pending_line(row: dict[str, Any]) -> tuple[object, ...]:
    waits = row["state"] == "queued" and row["seconds_to_next_try"] > 0
    return (
        row["name"],
        row["run_id"],
        row["url"],
        UPLOAD_STATES[row["state"]],
        _mb(row["sent_bytes"]),
        _mb(row["size_bytes"]),
        row["attempts"],
        f"in {row['seconds_to_next_try']:.0f} s" if waits else None,
    )


def ls(run_id: str | None = None, /, *, at: str | None = None) -> None:
    """List checkpoints with their sizes in MB and whether they were uploaded; with --at, those of a bucket.

    Args:
        run_id: Only this run; without it, all runs.
        at: List what this bucket holds.
    """
    if at is not None:
        archives, folders = list_bucket(str(parse_url(at)))
        columns: Columns = {"CHECKPOINT": "key", "MB": _megabytes}
        answer_rows(archives + folders, columns, none=f"{at} holds no checkpoints.", quiet="key")
        return
    home = Home.find()
    runs = list(reversed(RunStore(home).ls())) if run_id is None else [RunStore(home).find(run_id)]
    answer_rows(
        local_checkpoints(home, runs),
        {"CHECKPOINT": "name", "RUN": "run_id", "MB": _megabytes, "UPLOAD": "upload", "TO": "url"},
        none="There are no checkpoints.",
        quiet=lambda row: f"{row['run_id']}/{row['name']}",
    )


def _megabytes(row: Row) -> str:
    return _mb(row["size_bytes"])


def push(
    checkpoint: str | None = None,
    /,
    *,
    all: bool = False,  # noqa: A002  the option is --all
    to: str | None = None,
    config: Path | None = None,
    archive: bool = False,
    bandwidth: str | None = None,
    detach: bool = False,
) -> int:
    """Upload one checkpoint, or with --all every one that is not there yet, and wait until it has arrived.

    What breaks off is in the journal, and goes on with nightschool uploads retry.

    Args:
        checkpoint: Its folder, RUN/CHECKPOINT, or its name.
        all: All checkpoints of all runs that have an address.
        to: The address; without it, the one in the run's recipe (checkpoints.upload).
        config: Take the address from this recipe.
        archive: Pack it as NAME.tar.gz first; the archive is removed when it has arrived.
        bandwidth: At most so many bytes per second, as 20MB.
        detach: Leave it to the uploader, and return at once.
    """
    home = Home.find()
    if (checkpoint is None) != all:
        raise UsageError("Name one checkpoint, or write --all. List them with nightschool uploads ls.")
    url = next(iter(_places(to, config)), None)
    limit = None if bandwidth is None else _bytes(bandwidth)
    pairs = _every(home, url) if checkpoint is None else [find_checkpoint(home, checkpoint)]
    journal, results = uploads.Journal(home), []
    for run, point in pairs:
        settings = uploads.settings_of(run) or Upload()
        place = url or settings.url
        if place is None:
            raise UsageError(
                f"The recipe of {run.id} has no checkpoints.upload, so nothing says where {point.name} should go. "
                f"Add --to gs://bucket/folder."
            )
        asked = Upload(
            url=place,
            archive="tar.gz" if archive else settings.archive if url is None else "none",
            bandwidth=limit or settings.bandwidth,
        )
        entered = journal.enqueue(point.path, asked)
        if not detach:
            journal.retry([entered.id])
            entered = uploads.push_now(home, point.path, asked, say=note)
        results.append(entered)
    if detach and results:
        uploads.ensure_uploader(home)
    missed = [row for row in results if row.state != "done"] if not detach else []
    answer(
        [upload_row(row) for row in results],
        lambda: "\n".join(_result_line(row) for row in results) or "Everything is uploaded.",
        quiet=lambda: "\n".join(row.name for row in results),
    )
    return 1 if missed else 0


def push_all(
    *,
    to: str | None = None,
    config: Path | None = None,
    archive: bool = False,
    bandwidth: str | None = None,
    detach: bool = False,
) -> int:
    """Upload every checkpoint that is not there yet: the same as push --all.

    Args:
        to: The address; without it, those in the recipes of the runs.
        config: Take the address from this recipe.
        archive: Pack each as NAME.tar.gz first.
        bandwidth: At most so many bytes per second, as 20MB.
        detach: Leave it to the uploader, and return at once.
    """
    return push(all=True, to=to, config=config, archive=archive, bandwidth=bandwidth, detach=detach)


def _every(home: Home, url: str | None) -> list[tuple[Run, Checkpoint]]:
    """What should be somewhere and is not there yet, oldest first."""
    done = {(row.path, row.url) for row in uploads.Journal(home).ls() if row.state == "done"}
    pairs = []
    for run in reversed(RunStore(home).ls()):
        settings = uploads.settings_of(run)
        place = url or (settings.url if settings else None)
        if place is not None:
            address = str(parse_url(place))
            pairs += [(run, point) for point in checkpoints.ls(run) if (str(point.path), address) not in done]
    return pairs


def retry(*names: str, wait: bool = False) -> int:
    """Try failed and waiting uploads again now: all, or those of these checkpoints.

    Args:
        names: Names of checkpoints.
        wait: Do it here, and return when they have arrived.
    """
    home = Home.find()
    journal = uploads.Journal(home)
    rows = [row for row in journal.ls() if row.state in ("failed", "queued")]
    missing = set(names) - {row.name for row in rows}
    if missing:
        raise NotFound(f"No upload of {', '.join(sorted(missing))} waits. See nightschool uploads status.")
    due = journal.retry([row.id for row in rows if not names or row.name in names])
    if wait:
        due = [uploads.push_now(home, row.folder, row.settings, say=note) for row in due]
    elif due:
        # The one that runs may have been started with credentials that are refused.
        uploads.restart_uploader(home)
    answer(
        [upload_row(row) for row in due],
        lambda: "\n".join(_result_line(row) for row in due) or "Nothing waits to be uploaded.",
        quiet=lambda: "\n".join(row.name for row in due),
    )
    return 1 if wait and any(row.state != "done" for row in due) else 0


def pull(url: str, name: str = "latest", /) -> None:
    """Bring a checkpoint from a bucket into its run here, which is made if it is not there; every byte is compared.

    Args:
        url: gs://bucket/folder, or the address of one checkpoint or archive.
        name: A checkpoint's name, RUN/CHECKPOINT, or latest.
    """
    run, point = fetch_checkpoint(Home.find(), url, name, say=note)
    data = {"run_id": run.id, "name": point.name, "path": str(point.path), "size_bytes": folder_bytes(point.path)}
    answer(
        data,
        f"{point.name} of {run.id} is here and whole ({format_bytes(folder_bytes(point.path))}). "
        f"Go on with nightschool train --resume {run.id}/{point.name}",
        quiet=f"{run.id}/{point.name}",
    )


def _places(url: str | None, config: Path | None) -> list[str]:
    """The address that was given, or that of a recipe."""
    if url is not None:
        return [str(parse_url(url))]
    if config is None:
        return []
    place = read_recipe(config).checkpoints.upload.url
    if place is None:
        raise UsageError(f"{config} has no checkpoints.upload, so it names no bucket. Add it, or write the address.")
    return [str(parse_url(place))]


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--bandwidth: {error}.") from None


def _result_line(row: uploads.Upload) -> str:
    line = f"{UPLOAD_STATES[row.state]:<9}  {row.name}  {_mb(row.size_bytes)} MB  {row.url}"
    return f"{line}\n           {row.error}" if row.error else line


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f}"
