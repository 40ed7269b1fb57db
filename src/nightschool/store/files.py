"""Files that were uploaded to be trained on, and what jobs left to be downloaded: each is there as a whole or not at all.

An uploaded file is a folder below `files/` of its tenant's home. The figures of a job lie with the job, and are found
under an id that follows from the job's.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from nightschool.errors import Damaged, NotFound
from nightschool.events import now
from nightschool.store.atomic import publish_directory, read_json, remove_folder, sweep_partials, write_json
from nightschool.store.home import Home
from nightschool.store.names import home_of

Purpose = Literal["fine-tune", "fine-tune-results"]
RESULTS = "results.csv"
"""The figures of a job, in its folder."""
_CONTENT, _FACTS = "content.jsonl", "file.json"
_ID = re.compile(r"file-([0-9a-f]{24})")
_JOB = re.compile(r"ftjob-([0-9a-f]{24})")


@dataclass(frozen=True)
class StoredFile:
    """One file. `filename` is what its sender called it, and is never a path; `path` is where its bytes are.

    `format` and `num_examples` are of training data; those of figures are empty and 0.
    """

    id: str
    filename: str
    purpose: Purpose
    size_bytes: int
    created_at: datetime
    format: str
    num_examples: int
    path: Path


@dataclass(frozen=True)
class Arrival:
    """A file that is being received: its bytes go to `path`."""

    id: str
    path: Path

    def finish(self, *, filename: str, format: str, num_examples: int) -> None:  # noqa: A002 - the recipe's word
        """Say what the file is, once all of it is there."""
        facts = {"filename": filename, "format": format, "num_examples": num_examples, "created_at": now().isoformat()}
        write_json(self.path.with_name(_FACTS), facts)


def results_id(job_id: str) -> str | None:
    """The id of the file with the figures of a job; None for jobs that did not come through OpenAI's API."""
    match = _JOB.fullmatch(job_id)
    return f"file-{match[1]}" if match else None


class FileStore:
    """The files of one tenant. All of it blocks."""

    def __init__(self, home: Home, tenant: str) -> None:
        own = home_of(home, tenant)
        self._files, self._jobs = own.files, own.jobs

    @contextmanager
    def receive(self) -> Iterator[Arrival]:
        """Take in a file, which is there once the block has ended well and `finish` was called in it.

        Raises:
            DiskFull: If there is no room; then nothing is left of it.
        """
        if self._files.is_dir():
            sweep_partials(self._files)
        file_id = f"file-{secrets.token_hex(12)}"
        with publish_directory(self._files / file_id) as folder:
            yield Arrival(file_id, folder / _CONTENT)

    def get(self, file_id: str) -> StoredFile:
        """A file by its id.

        Raises:
            NotFound: If there is none; the same where it is another tenant's.
        """
        match = _ID.fullmatch(file_id)
        with contextlib.suppress(NotFound, FileNotFoundError):
            if match is not None and (self._files / file_id).is_dir():
                return self._uploaded(file_id)
            if match is not None:
                return self._results(f"ftjob-{match[1]}")
        raise NotFound(f"There is no file {file_id[:100]!r}. It was never uploaded, or was deleted.")

    def ls(self) -> list[StoredFile]:
        """All files, newest first."""
        found = []
        for path in self._files.iterdir() if self._files.is_dir() else ():
            if _ID.fullmatch(path.name):
                with contextlib.suppress(NotFound, FileNotFoundError, Damaged):  # it is being deleted
                    found.append(self._uploaded(path.name))
        for path in self._jobs.glob(f"ftjob-*/{RESULTS}"):
            with contextlib.suppress(FileNotFoundError):
                found.append(self._results(path.parent.name))
        return sorted(found, key=lambda file: (file.created_at, file.id), reverse=True)

    def delete(self, file_id: str) -> None:
        """Remove a file. Jobs that were begun with it have their own copy.

        Raises:
            NotFound: As `get` does.
        """
        file = self.get(file_id)
        if file.purpose == "fine-tune":
            remove_folder(file.path.parent)
        else:
            file.path.unlink(missing_ok=True)

    def recount(self, file_id: str, num_examples: int) -> None:
        """Say how many examples an uploaded file has left, after some were taken out; one without any is deleted."""
        facts_path = self._files / file_id / _FACTS
        if num_examples:
            write_json(facts_path, read_json(facts_path) | {"num_examples": num_examples})
        else:
            remove_folder(facts_path.parent)

    def _uploaded(self, file_id: str) -> StoredFile:
        path = self._files / file_id / _CONTENT
        facts = read_json(path.with_name(_FACTS))
        try:
            created_at = datetime.fromisoformat(facts.pop("created_at"))
            return StoredFile(
                id=file_id,
                purpose="fine-tune",
                size_bytes=path.stat().st_size,
                path=path,
                created_at=created_at,
                **facts,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(
                f"{path.with_name(_FACTS)} was altered ({error}). Delete the file and upload it again."
            ) from None

    def _results(self, job_id: str) -> StoredFile:
        path = self._jobs / job_id / RESULTS
        file_id = results_id(job_id)
        if file_id is None:
            raise FileNotFoundError(path)
        facts = path.stat()
        return StoredFile(
            id=file_id,
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            size_bytes=facts.st_size,
            created_at=datetime.fromtimestamp(facts.st_mtime, UTC),
            format="",
            num_examples=0,
            path=path,
        )
