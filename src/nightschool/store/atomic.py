"""Writing so that a crash, a signal or a full disk leaves the old state or the new one, never a mixture.

What is being written ends in `.partial` and is locked (`flock`) by its writer for as long as that lives, so that
`sweep_partials` can tell what a dead process left behind from what is being written now.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nightschool.errors import Conflict, Damaged, DiskFull, Locked, NightschoolError, NotFound

PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM)
# A sweeper holds a lock for the time of one removal; a writer that meets it tries again this long.
_CLAIM_SECONDS = 5.0


@contextmanager
def room_needed(path: Path) -> Iterator[None]:
    """Turn "no space left" inside the block into DiskFull, and "read-only" into Conflict.

    `path` is what was being written.
    """
    try:
        yield
    except Exception as error:
        named = refusal_of(error, path)
        if named is None:
            raise
        try:
            raise named from error
        finally:
            del named  # in a cycle with its traceback it would keep alive what the frames hold, mapped memory too


def refusal_of(error: Exception, path: object) -> NightschoolError | None:
    """What a file system refused, with what to do about it; None if the error is something else.

    `path` is what was to be read or written, where the error does not say it.
    """
    if isinstance(error, NightschoolError):
        return None

    def said(numbers: tuple[int, ...]) -> bool:
        # Libraries that write without Python (safetensors, Arrow) wrap the same fact in exceptions of their own.
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno in numbers
        return any(os.strerror(number) in str(error) for number in numbers)

    if said(FULL):
        return DiskFull(
            f"There is no room on the disk for {path}; what was stored before is still whole. "
            f"Free some space, or move the home with NIGHTSCHOOL_HOME, and try again."
        )
    path = getattr(error, "filename", None) or path
    if said((errno.EFBIG,)):
        return DiskFull(
            f"{path} takes a file that is longer than files may become here; what was stored before is still whole. Raise the limit "
            "(ulimit -f), or move the home with NIGHTSCHOOL_HOME to another file system, and try again."
        )
    if said((errno.EROFS,)):
        return Conflict(
            f"{path} cannot be written: its file system is read-only. Make it writable, or copy the home and name the "
            f"copy in NIGHTSCHOOL_HOME."
        )
    if said(_CLOSED):
        return Conflict(
            f"{path} is closed to this user ({os.strerror(errno.EACCES)}). Change its owner or its mode, or name "
            f"another home in NIGHTSCHOOL_HOME."
        )
    return None


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and make their names durable."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    with room_needed(path):
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: without this a rename can be lost with the power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and itself, durable."""
    for path, _, files in os.walk(folder):
        for name in files:
            # O_RDONLY is enough for fsync, and files may already be read-only.
            handle = os.open(Path(path) / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(path))


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """The descriptor of a new file that takes the place of `path` at the end of the block, as a whole and durably.

    Readers see the old content or the new. If the block fails, the new file is removed.

    Raises:
        DiskFull: If there is no room; `path` is then untouched.
    """
    make_folder(path.parent)
    with room_needed(path):
        temporary, handle = _open_temporary(path)
        try:
            try:
                yield handle
                os.fsync(handle)
                # Renamed while the lock is held, so that no sweeper takes it in between.
                temporary.replace(path)
            finally:
                os.close(handle)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_all(handle: int, content: bytes | memoryview) -> None:
    """Write all of `content` to a descriptor: one call of the system may write less."""
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path`, as `replacing` does."""
    with replacing(path) as handle:
        write_all(handle, content)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """`write_bytes` of indented JSON. NaN and infinity are refused (ValueError): they are no JSON."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        NotFound: If there is no such file.
        Damaged: If it holds anything but one JSON object.
    """
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist. Check the name, or where the home is (NIGHTSCHOOL_HOME).") from None


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that lies at `path`. Raises Damaged if it is anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"{path} is not JSON ({json_fault(error)}). Restore it from a backup, or remove what it belongs to."
        ) from error
    if not isinstance(content, dict):
        raise Damaged(
            f"{path} holds a JSON {type(content).__name__}, but an object belongs there. "
            f"Restore it from a backup, or remove what it belongs to."
        )
    return content


def json_fault(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that `json.loads` refused."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def partial_of(target: Path) -> Path:
    """Where `publish_directory` puts things together."""
    return target.with_name(target.name + PARTIAL)


@contextmanager
def own_partial(target: Path) -> Iterator[Path]:
    """Fill `<target>.partial` for somebody else to take, and hold its lock for the time of the block.

    It begins empty. If the block fails, or nobody took it, it is removed.

    Raises:
        Locked: If another process is writing it.
        DiskFull: If there is no room.
    """
    make_folder(target.parent)
    partial = partial_of(target)
    with room_needed(target):
        handle = _claim_folder(partial)
        try:
            yield partial
        finally:
            if _is_open_as(handle, partial):
                shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)


@contextmanager
def publish_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is whole and durable.

    Yields `<target>.partial`, empty. After the block every file and folder in it is fsynced, it is renamed to
    `target`, and the parent is fsynced. If anything fails, `target` does not exist and the partial is removed.

    With `replace`, a folder that is there already stays until the new one is whole, and then makes room for it.

    Raises:
        Conflict: If `target` exists: what is published is never written again, unless `replace` says so.
        Locked: If another process is writing the same target.
        DiskFull: If there is no room.
    """
    make_folder(target.parent)
    if not replace:
        _refuse_existing(target)
    with own_partial(target) as partial:
        yield partial
        sync_tree(partial)
        if replace and target.is_dir():
            remove_folder(target)
        _refuse_existing(target)
        partial.rename(target)
        try:
            sync_folder(target.parent)
        except BaseException:
            target.rename(partial)
            raise


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is either there as a whole or not at all; a crash leaves a partial to sweep."""
    doomed = folder.with_name(f".trash-{folder.name[:100]}-{secrets.token_hex(4)}{PARTIAL}")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not lock_now(handle):
            raise Locked(f"Another process is writing {folder}. Wait until it is done, or stop that process.")
        with room_needed(folder):
            folder.rename(doomed)
            sync_folder(folder.parent)
        shutil.rmtree(doomed)
    finally:
        os.close(handle)


def sweep_partials(folder: Path) -> list[Path]:
    """Remove what dead writers left in `folder` (not below it). What a living process writes stays.

    Returns:
        The paths that were removed.
    """
    removed = []
    for path in sorted(folder.glob(f"*{PARTIAL}")):
        if path.is_symlink():  # Nothing of ours is a link, and no lock can be had on one.
            path.unlink()
            removed.append(path)
            continue
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        try:
            if lock_now(handle) and _is_open_as(handle, path):
                if stat.S_ISDIR(os.fstat(handle).st_mode):
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
        finally:
            os.close(handle)
    return removed


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise Conflict(f"{target} exists, and nothing is ever written over. Choose another name.")


def _open_temporary(path: Path) -> tuple[Path, int]:
    while True:
        # At most 255 bytes are allowed in a file name; the target may use all of them.
        temporary = path.with_name(f".{path.name[:100]}-{secrets.token_hex(6)}{PARTIAL}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if lock_now(handle) and _is_open_as(handle, temporary):
            return temporary, handle
        os.close(handle)  # A sweeper was quicker than our lock; it removes the file.


def _claim_folder(partial: Path) -> int:
    """Create and lock `partial`, or take over and empty what a dead writer left. Returns the locked handle."""
    deadline = time.monotonic() + _CLAIM_SECONDS
    while True:
        partial.mkdir(exist_ok=True)
        try:
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        if lock_now(handle) and _is_open_as(handle, partial):
            for entry in partial.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            return handle
        os.close(handle)
        if time.monotonic() > deadline:
            raise Locked(f"Another process is writing {partial}. Wait until it is done, or stop that process.")
        time.sleep(0.02)


def lock_now(handle: int) -> bool:
    """Lock an open file, unless somebody else has it locked. Returns whether it did."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_open_as(handle: int, path: Path) -> bool:
    """Whether `path` still is what was opened: a sweeper may have removed it before our lock."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
