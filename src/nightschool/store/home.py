"""The home: the one folder under which everything that nightschool keeps lies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nightschool.store.atomic import make_folder

if TYPE_CHECKING:
    from nightschool.store.database import Database

HOME_VARIABLE = "NIGHTSCHOOL_HOME"
FOLDER_NAME = ".nightschool"


@dataclass(frozen=True)
class Home:
    """Where things lie. Nothing is created until `ensure` is called or something is written."""

    path: Path

    @classmethod
    def find(cls, directory: Path | None = None, *, env: Mapping[str, str] | None = None) -> Home:
        """`$NIGHTSCHOOL_HOME`, else `.nightschool` in `directory`, else in the working directory.

        The path is made absolute at once, so that a later change of the working directory moves nothing.
        """
        value = (os.environ if env is None else env).get(HOME_VARIABLE, "")
        path = Path(value).expanduser() if value else (directory or Path()).expanduser() / FOLDER_NAME
        return cls(Path(os.path.abspath(path)))  # noqa: PTH100  `resolve` would follow a home that is a link

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def memories(self) -> Path:
        """A folder for each explicit memory: its entries, and what is derived from them."""
        return self.path / "memories"

    @property
    def jobs(self) -> Path:
        """A folder for each job: its data, its log, and how it ended."""
        return self.path / "jobs"

    @property
    def groups(self) -> Path:
        """A folder for each group of jobs that share a base: which runs it trains, and the log of its processes."""
        return self.path / "groups"

    @property
    def files(self) -> Path:
        """A folder for each file that was uploaded to be trained on."""
        return self.path / "files"

    @property
    def data_sets(self) -> Path:
        """Where data sets that a recipe names are looked for: files that somebody put there."""
        return self.path / "datasets"

    @property
    def tenants(self) -> Path:
        """A home for each tenant but the default one: its runs, its models, its locks."""
        return self.path / "tenants"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def locks(self) -> Path:
        return self.path / "locks"

    @property
    def state_db(self) -> Path:
        return self.path / "state.db"

    @cached_property
    def database(self) -> Database:
        """The state database, the same for everybody to whom this object was handed down. Nothing is opened yet."""
        from nightschool.store.database import Database  # SQLAlchemy takes 0.2 s to import; not every command needs it.

        return Database(self)

    def ensure(self) -> Home:
        """Create the folders that are missing, durably. Returns itself."""
        for folder in (self.runs, self.models, self.cache, self.locks):
            make_folder(folder)
        return self
