"""The files of a candidate that is about to be published: they are whole, and what follows only looks at them.

A version exists when its manifest is there, and nobody serves it before. But whoever examines candidates may begin with
their files while the run still proves and seals them, and compares the digests afterwards with those of the manifest. The
note lies in the run's folder; it is a hint, and nothing depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nightschool.errors import NightschoolError
from nightschool.store.atomic import read_json, write_json
from nightschool.store.manifest import Manifest, digests_of
from nightschool.store.runs import Run
from nightschool.store.versions import FACTS

_NOTE = "candidate-files.json"


@dataclass(frozen=True)
class CandidateFiles:
    """`ref` is what the candidate will be called, `base` what it stands on, `folder` where its files lie now."""

    ref: str
    base: str
    folder: Path

    def announce(self, run: Run) -> None:
        """Say that they are there.

        Raises:
            DiskFull: If there is no room.
        """
        write_json(run.path / _NOTE, {"ref": self.ref, "base": self.base, "folder": str(self.folder)})

    @classmethod
    def announced(cls, run: Run) -> CandidateFiles | None:
        """Those of the run's candidate; None while they are not there yet, or if they are there no more."""
        try:
            note = read_json(run.path / _NOTE)
            found = cls(str(note["ref"]), str(note["base"]), Path(note["folder"]))
        except (NightschoolError, KeyError, TypeError):
            return None
        return found if found.folder.is_dir() else None

    @staticmethod
    def forget(run: Run) -> None:
        """Take the note of an earlier process of the run away."""
        (run.path / _NOTE).unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[CandidateFiles]:
        """The same files under a path that they keep for the block, though they are published, and so renamed, meanwhile.

        Where the system has no such paths it is their own, and who reads them too late finds nothing.
        """
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            through_handle = Path(f"/proc/self/fd/{handle}")
            yield replace(self, folder=through_handle) if through_handle.is_dir() else self
        finally:
            os.close(handle)

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file by its name. Raises Damaged if one vanishes meanwhile."""
        return digests_of(self.folder)


def are_published(digests: dict[str, str], manifest: Manifest) -> bool:
    """Whether a version holds the very files that had these digests before it was published."""
    return digests == {name: file.sha256 for name, file in manifest.files.items() if name != FACTS}
