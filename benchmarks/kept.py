"""Results of the parts of a long benchmark, kept in files, so that one that was cut off goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Kept:
    """A folder for these settings and sources: others have another one, so nothing stale is taken for fresh.

    It lies in the system's folder of temporary files, or where BENCHMARK_CACHE says.
    """

    def __init__(self, name: str, settings: dict[str, Any], sources: Iterable[Path]) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path in sorted(sources):
            digest.update(path.read_bytes())
        place = Path(os.environ.get("BENCHMARK_CACHE") or Path(tempfile.gettempdir()) / "nightschool-benchmarks")
        self.folder = place / name / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def once(self, part: str, make: Callable[[], T]) -> T:
        """What `make` gives, made at most once; plain values of JSON."""
        path = self.folder / f"{part}.json"
        if path.exists():
            known: T = json.loads(path.read_text())
            return known
        value = make()
        written = path.with_suffix(".new")
        written.write_text(json.dumps(value))
        written.replace(path)
        return value
