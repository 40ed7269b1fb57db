"""The journal: which checkpoints must go where, how far each file has come, and who is at it.

Rows are in the state database, so that they outlive every process. A row is `queued`, `running` while a process with
a lease is at it, `done`, or `failed` when trying again by itself would not help; a failed one waits for `retry`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from nightschool.config import checkpoints as config
from nightschool.errors import BucketMissing, Conflict, CredentialsRefused, NightschoolError, NotFound
from nightschool.events import now
from nightschool.remotes.address import parse_url
from nightschool.store.checkpoints import parse_checkpoint
from nightschool.store.home import Home
from nightschool.store.manifest import MANIFEST, read_manifest
from nightschool.store.runs import RunStore
from nightschool.store.tables import upload_files, uploads
from nightschool.work.backoff import BackOff
from nightschool.work.lease import Lease, Leased

UploadState = Literal["queued", "running", "done", "failed"]
UNFINISHED: tuple[UploadState, ...] = ("queued", "running", "failed")

# On another machine, a lease ends after this long without a sign of life.
_LEASE_SECONDS = 900.0
_BACK_OFF = BackOff(first_seconds=1.0, longest_seconds=300.0)
# Weights are what somebody needs first; the manifest is no data and goes last.
_FIRST = ("model", "adapter_model", "pytorch_model", "weights")


@dataclass(frozen=True)
class Upload(Leased):
    """One checkpoint on its way to one place. `bandwidth` is in bytes per second, None without a limit."""

    id: int
    home: str
    path: str
    url: str
    run_id: str
    name: str
    step: int
    digest: str
    archive: bool
    size_bytes: int
    bandwidth: int | None
    state: UploadState
    attempts: int
    next_try_at: datetime
    owner: str | None
    lease_until: datetime | None
    error_code: str | None
    error: str | None
    queued_at: datetime
    finished_at: datetime | None
    sent_bytes: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.path)

    @property
    def settings(self) -> config.Upload:
        """What was asked for when it was entered."""
        archive: Literal["none", "tar.gz"] = "tar.gz" if self.archive else "none"
        return config.Upload(url=self.url, archive=archive, bandwidth=self.bandwidth)


@dataclass(frozen=True)
class UploadFile:
    """One object of an upload. `etag` is set when all of it has arrived and was compared."""

    name: str
    size_bytes: int
    sha256: str
    stamp: str | None
    sent_bytes: int
    session: str | None
    etag: str | None

    @property
    def arrived(self) -> bool:
        return self.etag is not None


class Journal:
    """The uploads of one home."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._home = str(home.path)
        self._db = home.database

    def enqueue(self, checkpoint: Path, settings: config.Upload) -> Upload:
        """Enter a finished checkpoint of a run; one that is entered already, with the same content, stays as it is.

        Raises:
            NotFound: If it has no manifest, or lies in no run.
            Damaged: If its manifest was altered.
            UsageError: If the settings name no address of a store.
        """
        address = str(parse_url(settings.url or ""))
        run = RunStore(self.home).containing(checkpoint)
        point = parse_checkpoint(checkpoint)
        if run is None or point is None:
            raise NotFound(
                f"{checkpoint} is not a checkpoint of a run of {self.home.path}. Checkpoints are called "
                f"checkpoint-epoch…-step…-files…. Name one."
            )
        archive = settings.archive != "none"
        manifest = read_manifest(checkpoint)
        digest = digest_of(checkpoint)
        names = sorted(manifest.files, key=_urgency)
        facts = {
            "home": self._home,
            "run_id": run.id,
            "name": checkpoint.name,
            "step": point.step,
            "digest": digest,
            "archive": archive,
            "size_bytes": manifest.size_bytes,
            "bandwidth": settings.bandwidth,
        }
        fresh = {
            "state": "queued",
            "attempts": 0,
            "next_try_at": now(),
            "owner": None,
            "lease_until": None,
            "error_code": None,
            "error": None,
            "queued_at": now(),
            "finished_at": None,
        }
        files = [
            {
                "name": name,
                "place": place,
                "size_bytes": manifest.files[name].size_bytes,
                "sha256": manifest.files[name].sha256,
                "stamp": stamp_of(checkpoint / name),
                "sent_bytes": 0,
            }
            for place, name in enumerate(names)
        ]
        with self._db.write() as connection:
            found = _load(connection, uploads.c.path == str(checkpoint), uploads.c.url == address)
            if found and found[0].digest == digest and found[0].archive == archive:
                return found[0]
            if found:
                upload_id = found[0].id
                connection.execute(upload_files.delete().where(upload_files.c.upload_id == upload_id))
                connection.execute(uploads.update().where(uploads.c.id == upload_id).values(**facts, **fresh))
            else:
                row = facts | fresh | {"path": str(checkpoint), "url": address}
                key = connection.execute(uploads.insert().values(row)).inserted_primary_key
                assert key is not None
                upload_id = int(key[0])
            if files and not archive:
                connection.execute(upload_files.insert(), [{"upload_id": upload_id, **file} for file in files])
            return _load(connection, uploads.c.id == upload_id)[0]

    def ls(self, *, path: Path | None = None, states: Iterable[UploadState] | None = None) -> list[Upload]:
        """The uploads of this home, newest first."""
        conditions = [uploads.c.home == self._home]
        if path is not None:
            conditions.append(uploads.c.path == str(path))
        if states is not None:
            conditions.append(uploads.c.state.in_(list(states)))
        with self._db.read() as connection:
            return _load(connection, *conditions)

    def bytes_left(self, states: Iterable[UploadState] = UNFINISHED) -> int:
        """Bytes of all checkpoints in these states that have not arrived; by default also of those that have failed."""
        return sum(max(0, row.size_bytes - row.sent_bytes) for row in self.ls(states=states))

    def get(self, upload_id: int) -> Upload:
        with self._db.read() as connection:
            found = _load(connection, uploads.c.id == upload_id)
        if not found:
            raise NotFound(f"There is no upload {upload_id} in the journal. List them with nightschool uploads ls.")
        return found[0]

    def files(self, upload_id: int) -> list[UploadFile]:
        """The files of an upload, in the order in which they go."""
        columns = [column for column in upload_files.c if column.name not in ("upload_id", "place")]
        query = sa.select(*columns).where(upload_files.c.upload_id == upload_id).order_by(upload_files.c.place)
        with self._db.read() as connection:
            return [UploadFile(**row._mapping) for row in connection.execute(query)]

    def claim(self, upload_id: int | None = None) -> Upload | None:
        """Take the newest upload that is due, or that one, for this process. None if there is nothing to do.

        Of two processes, only one gets it. A row whose process died is due.
        """
        moment = now()
        lease = Lease.begin(moment, _LEASE_SECONDS)
        conditions = [uploads.c.home == self._home, uploads.c.state.in_(("queued", "running"))]
        if upload_id is not None:
            conditions.append(uploads.c.id == upload_id)
        with self._db.write() as connection:
            for row in _load(connection, *conditions):
                waits = upload_id is None and row.state == "queued" and _seconds_to_try(row, moment) > 0
                if waits or (row.state == "running" and row.lease.is_held_by_another(moment)):
                    continue
                # The condition is for PostgreSQL, where another transaction may have been quicker.
                as_seen = (
                    (uploads.c.id == row.id)
                    & (uploads.c.state == row.state)
                    & (uploads.c.owner.is_not_distinct_from(row.owner))
                )
                taken = (
                    uploads.update().where(as_seen).values(state="running", attempts=row.attempts + 1, **lease.columns)
                )
                if connection.execute(taken).rowcount:
                    return _load(connection, uploads.c.id == row.id)[0]
        return None

    def seconds_to_next(self) -> float | None:
        """How long until the next upload is due; None if none is queued or at work."""
        moment = now()
        return min((_seconds_to_try(row, moment) for row in self.ls(states=("queued", "running"))), default=None)

    def set_files(self, upload: Upload, files: list[dict[str, Any]]) -> None:
        """State the files of an upload that were not known when it was entered: its archive."""
        with self._db.write() as connection:
            self._still_mine(connection, upload)
            connection.execute(upload_files.delete().where(upload_files.c.upload_id == upload.id))
            rows = [
                {"upload_id": upload.id, "place": place, "sent_bytes": 0, **file} for place, file in enumerate(files)
            ]
            connection.execute(upload_files.insert(), rows)

    def note_file(self, upload: Upload, name: str, **changes: Any) -> None:
        """Keep how far a file has come, and renew the lease.

        Raises:
            Conflict: If the upload is not ours any more: the checkpoint was written again, or another process has it.
        """
        with self._db.write() as connection:
            self._still_mine(connection, upload)
            mine = (upload_files.c.upload_id == upload.id) & (upload_files.c.name == name)
            connection.execute(upload_files.update().where(mine).values(**changes))

    def finish(self, upload: Upload) -> None:
        """Everything has arrived. What had failed because this place refused everybody is due again.

        Raises:
            Conflict: As `note_file` does.
        """
        with self._db.write() as connection:
            self._still_mine(connection, upload)
            self._release(connection, upload, state="done", finished_at=now(), error=None, error_code=None)
            healed = (
                (uploads.c.home == self._home)
                & (uploads.c.url == upload.url)
                & (uploads.c.state == "failed")
                & uploads.c.error_code.in_((CredentialsRefused.code, BucketMissing.code))
            )
            connection.execute(uploads.update().where(healed).values(state="queued", attempts=0, next_try_at=now()))

    def give_back(self, upload: Upload) -> None:
        """Stop in the middle, without a fault: somebody else may go on at once."""
        with self._db.write() as connection:
            self._release(connection, upload, state="queued", next_try_at=now(), attempts=upload.attempts - 1)

    def fail(self, upload: Upload, error: NightschoolError, *, for_good: bool) -> Upload:
        """Note a failed attempt; unless it is for good, the next one comes after a pause that grows, and is random."""
        with self._db.write() as connection:
            self._release(
                connection,
                upload,
                state="failed" if for_good else "queued",
                next_try_at=now() + timedelta(seconds=_BACK_OFF.pause_seconds(upload.attempts)),
                error=str(error),
                error_code=error.code,
            )
        return self.get(upload.id)

    def forget(self, upload_ids: Iterable[int]) -> None:
        """Take rows out of the journal, whatever became of them."""
        with self._db.write() as connection:
            connection.execute(uploads.delete().where(uploads.c.id.in_(list(upload_ids))))

    def retry(self, upload_ids: Iterable[int] | None = None) -> list[Upload]:
        """Make failed and waiting uploads due now, all or those; returns them."""
        conditions = [uploads.c.home == self._home, uploads.c.state.in_(("failed", "queued"))]
        if upload_ids is not None:
            conditions.append(uploads.c.id.in_(list(upload_ids)))
        with self._db.write() as connection:
            due = _load(connection, *conditions)
            connection.execute(
                uploads.update()
                .where(uploads.c.id.in_([row.id for row in due]))
                .values(state="queued", attempts=0, next_try_at=now())
            )
        return [self.get(row.id) for row in due]

    def _still_mine(self, connection: sa.Connection, upload: Upload) -> None:
        """Renew the lease, if it is still ours."""
        mine = (uploads.c.id == upload.id) & (uploads.c.digest == upload.digest) & (uploads.c.owner == upload.owner)
        renewed = uploads.update().where(mine).values(lease_until=upload.lease.heartbeat(now(), _LEASE_SECONDS).until)
        if not connection.execute(renewed).rowcount:
            raise Conflict(
                f"The upload of {upload.name} to {upload.url} is not the one that was begun: the checkpoint was "
                f"written again, or another process has taken it. It begins anew."
            )

    def _release(self, connection: sa.Connection, upload: Upload, **changes: Any) -> None:
        mine = (uploads.c.id == upload.id) & (uploads.c.digest == upload.digest) & (uploads.c.owner == upload.owner)
        connection.execute(uploads.update().where(mine).values(owner=None, lease_until=None, **changes))


def _seconds_to_try(upload: Upload, moment: datetime) -> float:
    seconds = (upload.next_try_at - moment).total_seconds()
    # Longer than the longest pause is no pause: the clock was put back.
    return seconds if 0 < seconds <= _BACK_OFF.longest_seconds else 0.0


def digest_of(checkpoint: Path) -> str:
    """The SHA-256 of a checkpoint's manifest, which states the digests of everything else."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def stamp_of(path: Path) -> str | None:
    """What changes whenever a program writes a file: an equal stamp later means that nobody did. None: no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return f"{found.st_dev:x}:{found.st_ino:x}:{found.st_size:x}:{found.st_mtime_ns:x}:{found.st_ctime_ns:x}"


def _urgency(name: str) -> tuple[bool, str]:
    return not name.startswith(_FIRST), name


def _load(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> list[Upload]:
    sent = (
        sa.select(sa.func.coalesce(sa.func.sum(upload_files.c.sent_bytes), 0))
        .where(upload_files.c.upload_id == uploads.c.id)
        .scalar_subquery()
    )
    query = (
        sa.select(uploads, sent.label("sent_bytes"))
        .where(*conditions)
        .order_by(uploads.c.queued_at.desc(), uploads.c.id.desc())
    )
    return [Upload(**{**row._mapping, "sent_bytes": int(row.sent_bytes)}) for row in connection.execute(query)]
