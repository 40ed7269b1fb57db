"""Comparing the files of an index with the checksums that were written with them, at once or while the index is in use."""

from __future__ import annotations

import threading
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Self

from nightschool.store.atomic import read_json

META = "meta.json"
_CHUNK = 1 << 20


def checksum_of(file: IO[bytes], stop: threading.Event | None = None) -> int:
    """CRC-32 of what is left of a file. What is read until `stop` is set, where it is."""
    total = 0
    while not (stop is not None and stop.is_set()) and (part := file.read(_CHUNK)):
        total = zlib.crc32(part, total)
    return total


class Verification:
    """The files of an index as they are now, whatever takes their place while they are compared. Reads 1 MiB at a time.

    Raises:
        NotFound, Damaged: If the index has no readable `meta.json`.
        OSError: If one of its files is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._stop = threading.Event()
        with ExitStack() as opening:
            checksums = read_json(folder / META).get("checksums")
            self._expected = checksums if isinstance(checksums, dict) else {}
            self._files = {path.name: opening.enter_context(path.open("rb")) for path in sorted(folder.glob("*.npy"))}
            # Another process may have put a newer index in its place meanwhile.
            self._is_one = read_json(folder / META).get("checksums") == checksums
            self._opened = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def stop(self) -> None:
        """Give up, from another thread."""
        self._stop.set()

    def damaged(self) -> str | None:
        """The name of the first file that is not what was written; None if there is none, or it was stopped."""
        if not self._is_one:
            return None
        if self._files.keys() != self._expected.keys():
            return META
        for name, file in self._files.items():
            total = checksum_of(file, self._stop)
            if self._stop.is_set():
                return None
            if total != self._expected[name]:
                return name
        return None
