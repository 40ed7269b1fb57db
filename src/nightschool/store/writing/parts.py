"""A checkpoint of several processes: each rank's writer writes the files of its rank, and that of rank 0 commits them.

Rank r writes `<checkpoint>.rank<r>.partial`, with a receipt last. The writer of rank 0 writes its own files, waits for the
receipts of this very save, moves the files over, and publishes all of them under one manifest. The ranks need no other
word between them than the folder, which must be one that all of them see. Names of files must differ between ranks.
"""

from __future__ import annotations

import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nightschool.errors import Conflict, NotFound
from nightschool.store.atomic import own_partial, partial_of, read_json, sync_folder, write_json
from nightschool.store.manifest import FileFacts

RECEIPT = "part.json"
# The slowest rank decides; it writes about as much as the others.
WAIT_SECONDS = 900.0
_POLL_SECONDS = 0.02
_REFUSED = "refused.json"
# A receipt belongs to a save when these facts are equal: one of an attempt that died may still lie there.
_OF_THIS_SAVE = ("step", "attempt")


def own_part(target: Path, rank: int) -> AbstractContextManager[Path]:
    """The folder in which a rank puts its files together; removed at the end, whoever took what."""
    return own_partial(_part(target, rank))


def deliver_part(folder: Path, files: dict[str, FileFacts], facts: dict[str, Any]) -> None:
    """Say that the part is whole and durable."""
    sync_folder(folder)
    plain = {name: asdict(file) for name, file in files.items()}
    write_json(folder / RECEIPT, {"files": plain, **{key: facts.get(key) for key in _OF_THIS_SAVE}})


def await_commit(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> None:
    """Wait until rank 0 has committed the checkpoint to which the part belongs.

    Raises:
        Conflict: If it did not.
    """
    deadline = time.monotonic() + wait_seconds
    while (folder / RECEIPT).exists():
        if (folder / _REFUSED).exists():
            raise Conflict(f"Rank 0 could not commit the checkpoint: {read_json(folder / _REFUSED)['why']}")
        if time.monotonic() > deadline:
            raise Conflict(
                f"Rank 0 did not take {folder.name} within {wait_seconds:.0f} s. Look into its log for the reason."
            )
        time.sleep(_POLL_SECONDS)


def take_parts(
    target: Path, num_ranks: int, into: Path, facts: dict[str, Any], *, wait_seconds: float = WAIT_SECONDS
) -> dict[str, FileFacts]:
    """Wait for the parts of ranks 1 and up, move their files into `into`, and return what they are.

    Raises:
        Conflict: If a rank did not deliver, or delivered a file that another one wrote too.
    """
    deadline = time.monotonic() + wait_seconds
    receipts = {rank: _receipt(target, rank, facts, deadline) for rank in range(1, num_ranks)}
    files: dict[str, FileFacts] = {}
    for rank, receipt in receipts.items():
        for name, file in receipt["files"].items():
            if (into / name).exists():
                raise Conflict(
                    f"Rank {rank} wrote {name} of {target.name}, and another rank did too. Give them two names."
                )
            (partial_of(_part(target, rank)) / name).rename(into / name)
            files[name] = FileFacts(**file)
    return files


def release_parts(target: Path, num_ranks: int) -> None:
    """Tell the other ranks that the checkpoint is committed."""
    for rank in range(1, num_ranks):
        # Its owner removes it too, as soon as the receipt is gone.
        shutil.rmtree(partial_of(_part(target, rank)), ignore_errors=True)


def refuse_parts(target: Path, num_ranks: int, why: str) -> None:
    """Tell the other ranks that there will be no checkpoint, so that they do not wait for it."""
    for rank in range(1, num_ranks):
        folder = partial_of(_part(target, rank))
        if folder.is_dir():
            write_json(folder / _REFUSED, {"why": why})


def _receipt(target: Path, rank: int, facts: dict[str, Any], deadline: float) -> dict[str, Any]:
    path = partial_of(_part(target, rank)) / RECEIPT
    while True:
        try:
            receipt = read_json(path)
        except NotFound:
            receipt = {}
        if receipt and all(receipt.get(key) == facts.get(key) for key in _OF_THIS_SAVE):
            return receipt
        if time.monotonic() > deadline:
            raise Conflict(
                f"Rank {rank} did not deliver its part of {target.name} in time, so there is no such checkpoint. "
                "Look into its log for the reason."
            )
        time.sleep(_POLL_SECONDS)


def _part(target: Path, rank: int) -> Path:
    return target.with_name(f"{target.name}.rank{rank}")
