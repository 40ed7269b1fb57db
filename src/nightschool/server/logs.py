"""Structured logs: one JSON object a line, with the request id where there is one, never with a prompt."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime

_MOST_KINDS = 1000

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message", "request_id", …facts}`; facts come as `extra={"facts": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get() is not None:
            row["request_id"] = request_id.get()
        row |= getattr(record, "facts", {})
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=True, default=str)


class Throttle(logging.Filter):
    """Lets `most` lines that begin alike through in a minute; the next one says how many were left out.

    A library that complains of every connection would let strangers fill the disk.
    """

    def __init__(self, most: int = 10, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._most, self._clock = most, clock
        self._windows: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key, now = f"{record.name} {str(record.msg).partition(chr(10))[0]}", self._clock()
        since, lines = self._windows.get(key, (now, 0))
        if now - since >= 60:
            if lines > self._most:
                record.facts = {"left_out_before": lines - self._most}
            since, lines = now, 0
        if len(self._windows) > _MOST_KINDS:
            self._windows.clear()
        self._windows[key] = since, lines + 1
        return lines < self._most


def configure_logs(level: str) -> None:
    """Write our lines, and those of uvicorn, asyncio and mcp, to stdout as JSON; whoever redirects stdout has the whole log."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    throttled = logging.StreamHandler(sys.stdout)
    throttled.setFormatter(JsonLines())
    throttled.addFilter(Throttle())
    others = [(name, "warning", throttled) for name in ("uvicorn", "asyncio", "mcp")]
    for name, least, its_handler in [("nightschool", level, handler), *others]:
        logger = logging.getLogger(name)
        logger.handlers[:] = [its_handler]
        logger.setLevel(least.upper())
        logger.propagate = False
