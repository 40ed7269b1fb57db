"""The rows of metrics.jsonl while somebody writes them: whole rows only, and each of them read once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from nightschool.events import Row, parse_row


class RowsFollower:
    """Reads a JSONL file of metrics that grows, from where it stopped.

    A resumed run replaces the file by a shorter one; then it is read again from its beginning. Lines that are no JSON
    object with a `step` are passed over: a disk that was full, or a machine that lost power, leaves such ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._offset_bytes = 0
        self._inode: int | None = None

    def update(self) -> list[Row]:
        """Read what was added; return all rows so far."""
        try:
            with self.path.open("rb") as file:
                self._read(file)
        except OSError:  # not there yet, or being replaced at this moment
            return self.rows
        return self.rows

    def _read(self, file: IO[bytes]) -> None:
        facts = os.fstat(file.fileno())
        if facts.st_ino != self._inode or facts.st_size < self._offset_bytes:
            self.rows, self._offset_bytes, self._inode = [], 0, facts.st_ino
        file.seek(self._offset_bytes)
        for line in file:
            if not line.endswith(b"\n"):  # is being written
                return
            self._offset_bytes += len(line)
            row = parse_row(line)
            if row is not None:
                self.rows.append(row)


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a metrics file; none where there is no file."""
    return RowsFollower(path).update()


def is_number(value: Any) -> bool:
    """Whether a figure of a row is one."""
    return isinstance(value, int | float) and not isinstance(value, bool)
