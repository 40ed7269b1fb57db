"""One JSON object per event: the log of a run or of a server, for programs to read."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def now() -> datetime:
    """The present moment in UTC."""
    return datetime.now(UTC)


class EventLog:
    """Appends events to a JSONL file, one line per event, from any thread.

    Each line is written by a single `write` in append mode, so that two processes never mix within a line. `always`
    are facts that every event carries, such as the id of its run.
    """

    def __init__(self, path: Path, **always: Any) -> None:
        self.path = path
        self._always = always
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, **facts: Any) -> None:
        """Append `{"time": …, "event": event, **always, **facts}`."""
        self.append({"time": now().isoformat(), "event": event, **self._always, **facts})

    def append(self, row: dict[str, Any]) -> None:
        """Append one object as it is."""
        line = json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a JSONL file; a last line that is still being written is left for later."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def parse_row(line: bytes | str) -> Row | None:
    """A line as a row, or None if it is no JSON object with a `step`."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
