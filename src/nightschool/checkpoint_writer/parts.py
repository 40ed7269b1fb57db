"""A checkpoint of several processes: each rank's writer writes the files of its rank, and that of rank 0 commits them.

Rank r writes `<checkpoint>.rank<r>.partial`, with a receipt last. The writer of rank 0 writes its own files, waits for the
receipts of this very save, links the files into its folder, and publishes all of them under one manifest. A rank that
cannot write says so in its receipt; rank 0 says so in `<checkpoint>.refused`. The ranks need no other word between them than
the folder, which must be one that all of them see. Names of files must differ between ranks.

A writer that was killed is replaced, and does all of this again: what is there already is found to be so.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nightschool.errors import Conflict, Damaged, DiskFull, NightschoolError, NotFound
from nightschool.store.atomic import PARTIAL, own_partial, partial_of, read_json, sync_folder, write_json
from nightschool.store.locks import is_held
from nightschool.store.manifest import FileInfo, read_manifest

RECEIPT = "part.json"
REFUSED = ".refused"
# For a process that lives: it may wait for uploads, or write to a disk that others use.
WAIT_SECONDS = 3600.0
# Whoever writes for a rank, or will, holds its lock. Between a writer that was killed and the next one nobody may.
GONE_SECONDS = 30.0
_POLL_SECONDS = 0.02
_LOOK_SECONDS = 1.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK)

Found = TypeVar("Found")


class PartRefused(Conflict, code="conflict"):
    """One of the ranks could not write, so that there is no checkpoint; `disk_full` tells the reason apart."""

    def __init__(self, message: str, *, disk_full: bool) -> None:
        super().__init__(message)
        self.disk_full = disk_full


@dataclass(frozen=True)
class SharedSave:
    """One save of several ranks. `step` and `attempt` tell it from one of that name by an attempt that died.

    `lock_path` gives the lock that a rank holds for as long as it writes checkpoints of this run.
    """

    target: Path
    num_ranks: int
    step: int
    attempt: int
    lock_path: Callable[[int], Path]

    @property
    def is_committed(self) -> bool:
        """Whether the checkpoint is there."""
        try:
            facts = read_manifest(self.target).facts
        except NightschoolError:
            return False
        return self._is_meant_by(facts)

    def own_part(self, rank: int) -> AbstractContextManager[Path]:
        """The folder in which a rank puts its files together; removed at the end, whoever took what."""
        return own_partial(self._part(rank))

    def deliver(self, folder: Path, files: dict[str, FileInfo]) -> None:
        """Say that the part in `folder` is whole and durable."""
        sync_folder(folder)
        write_json(folder / RECEIPT, self._word | {"files": {name: asdict(file) for name, file in files.items()}})

    def decline(self, folder: Path, why: Exception) -> None:
        """Say that there will be no such part, and wait until rank 0 knows."""
        for path in folder.iterdir():
            path.unlink()  # which makes room for the word
        write_json(folder / RECEIPT, self._word | {"error": str(why), "disk_full": isinstance(why, DiskFull)})
        with suppress(Conflict):
            self.await_commit(folder)

    def await_commit(self, folder: Path) -> None:
        """Wait until rank 0 has committed the checkpoint with the part in `folder`.

        Raises:
            PartRefused: If it could not.
            Conflict: If it is gone, or did not in time.
        """

        def committed() -> bool | None:
            waiting = (folder / RECEIPT).exists()
            if self.is_committed:
                return True
            if not waiting:
                raise Conflict(f"A later attempt has begun, and {self.target.name} is not waited for any more.")
            self.raise_refusal()
            return None

        self._wait_for(0, committed, f"commit {self.target.name}")

    def take_parts(self, into: Path) -> dict[str, FileInfo]:
        """Wait for the parts of ranks 1 and up, put their files into `into` too, and return what they are.

        Raises:
            PartRefused: If a rank could not write.
            Conflict: If a rank is gone, did not deliver in time, or delivered a file that another one wrote too.
        """
        files: dict[str, FileInfo] = {}
        for rank in range(1, self.num_ranks):
            receipt = self._wait_for(rank, partial(self._receipt, rank), f"deliver its part of {self.target.name}")
            for name, file in receipt["files"].items():
                if (into / name).exists():
                    raise Conflict(
                        f"Rank {rank} wrote {name} of {self.target.name}, and another rank did too. Give them two names."
                    )
                _put(partial_of(self._part(rank)) / name, into / name)
                files[name] = FileInfo(**file)
        return files

    def release(self) -> None:
        """After the commit: the parts are not needed any more, nor what was said of an earlier save."""
        for rank in range(1, self.num_ranks):
            shutil.rmtree(partial_of(self._part(rank)), ignore_errors=True)  # its owner does so too
        release_stale_parts(self.target.parent, parts=False)

    def refuse(self, why: str, *, disk_full: bool) -> None:
        """Tell the other ranks that there will be no checkpoint, so that they do not wait for it."""
        write_json(self._refusal, self._word | {"why": why, "disk_full": disk_full})

    def raise_refusal(self) -> None:
        """Say what `refuse` said of this save, if anything.

        Raises:
            PartRefused: With the reason.
        """
        refusal = _read(self._refusal)
        if refusal is not None and self._is_meant_by(refusal):
            raise PartRefused(
                f"Rank 0 could not commit the checkpoint: {refusal['why']}", disk_full=refusal["disk_full"]
            )

    @property
    def _word(self) -> dict[str, Any]:
        return {"step": self.step, "attempt": self.attempt}

    def _is_meant_by(self, facts: dict[str, Any]) -> bool:
        return all(facts.get(key) == value for key, value in self._word.items())

    @property
    def _refusal(self) -> Path:
        return self.target.with_name(self.target.name + REFUSED)

    def _part(self, rank: int) -> Path:
        return self.target.with_name(f"{self.target.name}.rank{rank}")

    def _receipt(self, rank: int) -> dict[str, Any] | None:
        receipt = _read(partial_of(self._part(rank)) / RECEIPT)
        if receipt is None or not self._is_meant_by(receipt):
            return None
        if "error" in receipt:
            raise PartRefused(
                f"Rank {rank} could not write its part of {self.target.name}: {receipt['error']}",
                disk_full=receipt["disk_full"],
            )
        return receipt

    def _wait_for(self, rank: int, look: Callable[[], Found | None], what: str) -> Found:
        """What `look` finds in the end, which is up to another rank.

        Raises:
            Conflict: If that one is gone, or takes too long.
        """
        # Rank 0 waits for others itself, and then says how that ended.
        longest = WAIT_SECONDS * (2 if rank == 0 else 1)
        began = seen = looked = time.monotonic()
        while (found := look()) is None:
            now = time.monotonic()
            if now - looked >= _LOOK_SECONDS:
                looked = now
                seen = now if is_held(self.lock_path(rank)) else seen
            if now - seen > GONE_SECONDS or now - began > longest:
                raise Conflict(f"Rank {rank} did not {what}, so there is no such checkpoint. Look into its log.")
            time.sleep(_POLL_SECONDS)
        return found


def release_stale_parts(folder: Path, *, parts: bool = True) -> None:
    """Remove what an attempt whose rank 0 is gone left in the folder of checkpoints."""
    for path in folder.glob(f"*{REFUSED}"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"*.rank*{PARTIAL}") if parts else ():
        shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (NotFound, Damaged):  # there is none, or its folder is being removed
        return None


def _put(source: Path, target: Path) -> None:
    """Give a file a second name, so that a second try finds it under the first one."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        source.rename(target)
