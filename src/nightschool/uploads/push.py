"""Bring one upload to its place: data, then the manifest, then the pointer.

Each step leaves the bucket in order, so that whoever goes on after a crash, or beside a zombie, does no harm: data
without a manifest does not exist, a manifest is only ever created, and the pointer only moves forward.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nightschool.errors import (
    BucketMissing,
    Conflict,
    CredentialsRefused,
    Damaged,
    Interrupted,
    MadeByNewer,
    NightschoolError,
    NotFound,
    RemoteError,
    Unreachable,
)
from nightschool.events import now
from nightschool.remotes import TIMEOUT_SECONDS, open_remote
from nightschool.remotes.remote import Remote
from nightschool.remotes.transfer import Throttle, Transfer
from nightschool.store.manifest import MANIFEST, parse_manifest, verify
from nightschool.uploads.archive import make_archive
from nightschool.uploads.journal import Journal, Upload, UploadFile, digest_of, stamp_of
from nightschool.uploads.layout import ARCHIVE, LATEST, Pointer, made_when, move_pointer
from nightschool.work.backoff import BackOff

Say = Callable[[str], None]
Stop = Callable[[], bool]

_NOTE_SECONDS = 2.0
_IN_THE_FOREGROUND = BackOff(first_seconds=1.0, longest_seconds=30.0)
# What the user must mend is tried this often, with growing pauses, before it waits for `retry`.
_TRIES_UNTIL_MENDED = 5


def attempt(
    journal: Journal,
    upload: Upload,
    *,
    say: Say,
    stop: Stop = lambda: False,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Upload:
    """Try once to bring a claimed upload to its place. Never raises for what the journal can say.

    Raises:
        Interrupted: If `stop` says so; the upload is given back.
    """
    try:
        if digest_of(upload.folder) != upload.digest:
            # It was written again under its name, by a run that was resumed from an earlier step.
            return journal.enqueue(upload.folder, upload.settings)
        remote = open_remote(upload.url, timeout_seconds=timeout_seconds)
        _push(journal, upload, remote, say, stop)
        journal.finish(upload)
    except Interrupted:
        journal.give_back(upload)
        raise
    except NightschoolError as error:
        return journal.fail(upload, error, for_good=_for_good(error, upload))
    except FileNotFoundError as error:
        lost = NotFound(f"{error.filename or upload.path} is gone. The checkpoint was removed before it was uploaded.")
        return journal.fail(upload, lost, for_good=True)
    except OSError as error:
        broken = NightschoolError(f"{error.filename or upload.path} cannot be read: {error.strerror}. See to the disk.")
        return journal.fail(upload, broken, for_good=upload.attempts >= _TRIES_UNTIL_MENDED)
    except Exception as error:  # one upload that breaks the uploader would keep all others from going
        say(traceback.format_exc())
        mistake = NightschoolError(f"{type(error).__name__}: {error}. This is a mistake of nightschool; please tell.")
        return journal.fail(upload, mistake, for_good=upload.attempts >= _TRIES_UNTIL_MENDED)
    return journal.get(upload.id)


def push_until_done(
    journal: Journal, upload: Upload, *, say: Say, stop: Stop = lambda: False, give_up_seconds: float
) -> Upload:
    """Try again and again, in this process, until the upload is done, failed for good, or the time is over."""
    deadline = time.monotonic() + give_up_seconds
    told = ""
    while True:
        claimed = journal.claim(upload.id)
        upload = journal.get(upload.id) if claimed is None else attempt(journal, claimed, say=say, stop=stop)
        if upload.state in ("done", "failed"):
            return upload
        news = f"Not uploaded yet {upload.name}: {upload.error or 'another process is at it'}"
        if news != told:
            say(news)
            told = news
        pause = _IN_THE_FOREGROUND.pause_seconds(upload.attempts)
        if time.monotonic() + pause > deadline:
            return upload
        time.sleep(pause)


def _for_good(error: NightschoolError, upload: Upload) -> bool:
    if isinstance(error, Unreachable):
        return False
    if isinstance(error, CredentialsRefused | BucketMissing):
        return upload.attempts >= _TRIES_UNTIL_MENDED
    # A conflict of the journal (the checkpoint was written again) changes nothing there; one in the bucket stays.
    return isinstance(error, Conflict | Damaged | NotFound | RemoteError) or upload.attempts >= _TRIES_UNTIL_MENDED


def _push(journal: Journal, upload: Upload, remote: Remote, say: Say, stop: Stop) -> None:
    plain = json.loads((upload.folder / MANIFEST).read_bytes())
    number = plain["facts"].get("attempt", 0)
    number = number if isinstance(number, int) else 0
    if upload.archive:
        key = upload.name + ARCHIVE
        _push_archive(journal, upload, remote, key, say, stop)
        pointers = {LATEST: key}
    else:
        key = f"{upload.run_id}/{upload.name}"
        _push_folder(journal, upload, remote, key, plain, say, stop)
        # Each names the checkpoint from where it lies itself.
        pointers = {f"{upload.run_id}/{LATEST}": upload.name, LATEST: key}
    for where, what in pointers.items():
        pointer = Pointer(
            upload.run_id, upload.name, what, upload.step, number, upload.digest, updated_at=now().isoformat()
        )
        move_pointer(remote, where, pointer)


def _push_folder(
    journal: Journal, upload: Upload, remote: Remote, key: str, plain: dict[str, Any], say: Say, stop: Stop
) -> None:
    manifest = (upload.folder / MANIFEST).read_bytes()
    if _is_there(remote, f"{key}/{MANIFEST}", manifest, plain, upload):
        return
    say(f"Uploading to {remote.url_of(key)}")
    throttle = Throttle(upload.bandwidth)
    for file in journal.files(upload.id):
        if not file.arrived:
            _send(journal, upload, file, upload.folder / file.name, f"{key}/{file.name}", remote, throttle, stop)
    remote.put_if_absent(f"{key}/{MANIFEST}", manifest)
    say(f"Successfully uploaded {upload.name}")


def _is_there(remote: Remote, key: str, manifest: bytes, plain: dict[str, Any], upload: Upload) -> bool:
    """Whether the bucket has this very checkpoint. One of an earlier attempt of the same run makes room for it.

    Raises:
        Conflict: If the bucket has another checkpoint of this name.
    """
    try:
        present = remote.read(key, most_bytes=64 << 20).data
    except NotFound:
        return False
    if present == manifest:
        return True
    if not _is_manifest(present) and remote.read(key).data == present:
        # It was altered on its way there by a process that could not look any more; it describes nothing.
        remote.delete(key)
        return False
    try:
        earlier = int(json.loads(present)["facts"]["attempt"]) < int(plain["facts"]["attempt"])
    except (ValueError, KeyError, TypeError):
        earlier = False
    if not earlier:
        raise Conflict(
            f"{remote.url_of(key)} is another checkpoint of this name ({made_when(present)}) than {upload.path} "
            f"({made_when(manifest)}). Upload it to another address, or remove one of the two."
        )
    # A run that was resumed from an earlier step has written this name again. Without its manifest the old one does
    # not exist any more, and what is left of it is overwritten or removed.
    remote.delete(key)
    folder = key.rpartition("/")[0]
    for found in list(remote.list(folder)):
        if found.key.removeprefix(folder + "/") not in plain["files"]:
            remote.delete(found.key)
    return False


def _is_manifest(content: bytes) -> bool:
    try:
        parse_manifest(content, Path(MANIFEST))
    except MadeByNewer:
        return True
    except Damaged:
        return False
    return True


def _send(
    journal: Journal,
    upload: Upload,
    file: UploadFile,
    path: Path,
    key: str,
    remote: Remote,
    throttle: Throttle,
    stop: Stop,
) -> None:
    sent_bytes, noted_at = 0, time.monotonic()

    def on_bytes(num_bytes: int) -> None:
        nonlocal sent_bytes, noted_at
        if stop():
            raise Interrupted(f"The upload of {upload.name} was stopped; it goes on where it was.")
        sent_bytes = min(sent_bytes + num_bytes, file.size_bytes)
        if time.monotonic() - noted_at > _NOTE_SECONDS:
            noted_at = time.monotonic()
            journal.note_file(upload, file.name, sent_bytes=sent_bytes)

    def on_session(session: str | None) -> None:
        journal.note_file(upload, file.name, session=session)

    if path.stat().st_size != file.size_bytes:
        raise Damaged(
            f"{path} has {path.stat().st_size} bytes, but its manifest says {file.size_bytes}. "
            f"It was altered on this disk, and is not uploaded; remove that checkpoint."
        )
    # A file that no program has touched since it was hashed need not be hashed again.
    untouched = file.stamp is not None and stamp_of(path) == file.stamp
    transfer = Transfer(
        throttle=throttle,
        on_bytes=on_bytes,
        sha256=None if untouched else file.sha256,
        session=file.session,
        on_session=on_session,
    )
    etag = remote.put_file(key, path, transfer)
    journal.note_file(upload, file.name, sent_bytes=file.size_bytes, session=None, etag=etag or "-")


def _push_archive(journal: Journal, upload: Upload, remote: Remote, key: str, say: Say, stop: Stop) -> None:
    folder = journal.home.cache / "uploads" / f"{upload.id}-{upload.digest[:16]}"
    for old in folder.parent.glob(f"{upload.id}-*"):
        if old != folder:  # of a checkpoint that was written again
            shutil.rmtree(old)
    path = folder / key
    if not path.exists():
        verify(upload.folder, digests=True)
        say(f"Creating archive: {path.name}")
        make_archive(upload.folder, path)
    files = journal.files(upload.id)
    size_bytes = path.stat().st_size
    if not files or files[0].size_bytes != size_bytes:
        # Asked before it is entered, so that `retry` asks again.
        if remote.exists(key):
            raise Conflict(
                f"{remote.url_of(key)} exists already, and an archive tells nothing of its run. "
                f"Upload to an address of its own, or remove it there."
            )
        journal.set_files(upload, [{"name": key, "size_bytes": size_bytes, "sha256": "", "stamp": None}])
        files = journal.files(upload.id)
    if not files[0].arrived:
        say(f"Uploading to {remote.url_of(key)}")
        # It was made a moment ago, of files that were compared with their manifest.
        file = UploadFile(key, size_bytes, "", stamp_of(path), 0, files[0].session, None)
        _send(journal, upload, file, path, key, remote, Throttle(upload.bandwidth), stop)
        say(f"Successfully uploaded {key}")
    shutil.rmtree(folder)
    say(f"Cleaned up {path.name}")
