"""The book of one name: its aliases, every move of them, and the version ids that were ever given out.

Pure values: a move returns a new book. The registry reads and writes it, under a lock.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from nightschool.errors import Damaged, NameRefused, NotFound
from nightschool.events import now
from nightschool.store.atomic import read_json, write_json
from nightschool.store.names import CHAMPION, check_alias, is_stamp

Action = Literal["promote", "rollback", "pin", "unpin", "set", "unset"]
_FORMAT = 1


def _version_id(text: str) -> str:
    if not is_stamp(text):
        raise ValueError(f"{text!r} is not a version id")
    return text


VersionId = Annotated[str, AfterValidator(_version_id)]


class AliasMove(BaseModel):
    """One line of the history: who moved which alias, from which version id to which."""

    model_config = ConfigDict(frozen=True)

    at: datetime
    by: str
    alias: str
    action: Action
    before: str | None
    after: VersionId | None


class AliasState(BaseModel):
    """What aliases.json holds. `issued` and `removed` are version ids; an id in either is never given out again."""

    model_config = ConfigDict(frozen=True)

    aliases: dict[str, VersionId] = {}
    pinned: bool = False
    history: tuple[AliasMove, ...] = ()
    issued: tuple[VersionId, ...] = ()
    removed: tuple[VersionId, ...] = ()

    @property
    def champion(self) -> str | None:
        return self.aliases.get(CHAMPION)

    def champions(self) -> list[str]:
        """The champions that a rollback can walk back through, oldest first; the last is the present one."""
        stack: list[str] = []
        for move in self.history:
            if move.alias != CHAMPION or move.after is None:
                continue
            if move.action == "rollback":
                stack.pop()
                while stack and stack[-1] != move.after:
                    stack.pop()
            if not stack or stack[-1] != move.after:
                stack.append(move.after)
        return stack

    def previous(self, existing: Collection[str]) -> str | None:
        """The champion before the present one, of those that still exist."""
        for version in reversed(self.champions()[:-1]):
            if version != self.champion and version in existing:
                return version
        return None

    def moved(self, alias: str, version: str | None, action: Action, by: str) -> AliasState:
        """The book after an alias was moved to a version, or taken away (None)."""
        before = self.aliases.get(alias)
        move = AliasMove(at=now(), by=by, alias=alias, action=action, before=before, after=version)
        aliases = {key: value for key, value in self.aliases.items() if key != alias}
        if version is not None:
            aliases[alias] = version
        return self.model_copy(update={"aliases": aliases, "history": (*self.history, move)})

    def used(self, version: str) -> bool:
        """Whether this id was ever given out."""
        return version in self.issued or version in self.removed


def read_book(path: Path) -> AliasState:
    """The book in aliases.json, or an empty one if there is no such file.

    Raises:
        Damaged: If the file was altered or cut.
    """
    try:
        content = read_json(path)
    except NotFound:
        return AliasState()
    try:
        if content["format"] != _FORMAT:
            raise Damaged(
                f"{path} has the format {content['format']!r}, but this version of nightschool reads {_FORMAT}. "
                f"Use the version of nightschool that wrote it."
            )
        book = AliasState.model_validate(content)
        for alias in book.aliases.keys() - {CHAMPION}:
            check_alias(alias)
        if book.champions()[-1:] != ([book.champion] if book.champion else []):
            raise ValueError(f"the champion is {book.champion}, but its history ends with {book.champions()[-1:]}")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, NameRefused) as error:
        raise Damaged(f"{path} does not have the form of aliases ({error!r}). Restore it from a copy.") from error
    return book


def write_book(path: Path, book: AliasState) -> None:
    """Replace aliases.json as a whole. Raises DiskFull; the old book then stays."""
    write_json(path, {"format": _FORMAT} | book.model_dump(mode="json"))
