"""One name of the registry on disk: which of its versions exist, its book, and changing the book under a lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from nightschool.errors import Damaged
from nightschool.events import now
from nightschool.store.alias_state import AliasState, read_book, write_book
from nightschool.store.atomic import remove_folder, sweep_partials
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.manifest import MANIFEST
from nightschool.store.names import check_full_name, is_stamp, lock_path, model_path, moment_of, next_free_stamp

# How long a change of the book waits for another one; each takes milliseconds.
_WAIT_SECONDS = 30.0


class Edit:
    """A book that is being changed under the lock of its name: assign the new one to `book`."""

    def __init__(self, path: Path, book: AliasState) -> None:
        self._path = path
        self._saved = book
        self.book = book

    def save(self) -> None:
        """Write the book now, if it changed. Raises DiskFull; the old book then stays on disk."""
        if self.book is not self._saved:
            write_book(self._path, self.book)
            self._saved = self.book


class RegistryEntry:
    """The folder of one name. Raises NameRefused if the name may not become a path."""

    def __init__(self, home: Home, name: str) -> None:
        self.name = check_full_name(name)
        self.folder = model_path(home, name)
        self._lock_path = lock_path(home, "models", name)
        self._book_path = self.folder / "aliases.json"

    def book(self) -> AliasState:
        """The present book; readers take no lock, because it is replaced as a whole."""
        return read_book(self._book_path)

    def mark(self) -> tuple[int, ...] | None:
        """Which file the book is: each save makes a new one. None if there is no book."""
        try:
            found = self._book_path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    @property
    def is_used(self) -> bool:
        """Whether a version exists. Where the book is damaged, whether any was finished: the name is not hidden."""
        try:
            return bool(self.ids())
        except Damaged:
            return True

    def ids(self) -> list[str]:
        """Ids of the versions that exist, newest first: finished, and not removed."""
        finished = [id_ for id_ in self._folders() if (self.folder / id_ / MANIFEST).is_file()]
        if not finished:
            return []
        removed = self.book().removed
        return sorted((id_ for id_ in finished if id_ not in removed), reverse=True)

    @contextmanager
    def editing(self) -> Iterator[Edit]:
        """Hold the lock of the name; what was assigned to `.book` is saved at the end, unless the block raises."""
        with lock(self._lock_path, f"the aliases of {self.name}", wait_seconds=_WAIT_SECONDS):
            edit = Edit(self._book_path, self.book())
            yield edit
            edit.save()

    def issue(self) -> str:
        """Give out an id that is later than every other of this name."""
        with self.editing() as edit:
            newest = max([*edit.book.issued, *edit.book.removed, *self._folders()], default=None)
            moment = max(now(), moment_of(newest) + timedelta(seconds=1)) if newest else now()
            version = next_free_stamp(moment, edit.book.used)
            edit.book = edit.book.model_copy(update={"issued": (*edit.book.issued, version)})
        return version

    def sweep(self) -> None:
        """Remove what crashes left: folders of dead publishers, and versions whose removal was begun."""
        sweep_partials(self.folder)
        with self.editing() as edit:
            for version in edit.book.removed:
                if (self.folder / version).exists():
                    remove_folder(self.folder / version)

    def _folders(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if is_stamp(path.name)] if self.folder.is_dir() else []
