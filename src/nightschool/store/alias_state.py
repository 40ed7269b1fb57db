"""The book of one name: its aliases, every move of them, and the version ids that were ever given out.

Pure values: a move returns a new book. The registry reads and writes it, under a lock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from nightschool.errors import Damaged, NameRefused, NotFound
from nightschool.events import now
from nightschool.store.atomic import read_json, write_json
from nightschool.store.names import CHAMPION, check_alias, is_stamp

Action = Literal["promote", "rollback", "pin", "unpin", "set", "unset"]
_FORMAT = 1


@dataclass(frozen=True)
class AliasMove:
    """One line of the history: who moved which alias, from which version id to which."""

    at: datetime
    by: str
    alias: str
    action: Action
    before: str | None
    after: str | None


@dataclass(frozen=True)
class AliasState:
    """What aliases.json holds. `issued` and `removed` are version ids; an id in either is never given out again."""

    aliases: dict[str, str] = field(default_factory=dict)
    pinned: bool = False
    history: tuple[AliasMove, ...] = ()
    issued: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

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
        move = AliasMove(now(), by, alias, action, self.aliases.get(alias), version)
        aliases = {key: value for key, value in self.aliases.items() if key != alias}
        if version is not None:
            aliases[alias] = version
        return dataclasses.replace(self, aliases=aliases, history=(*self.history, move))

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
        book = AliasState(
            aliases={
                (alias if alias == CHAMPION else check_alias(alias)): _checked(version)
                for alias, version in content["aliases"].items()
            },
            pinned=bool(content["pinned"]),
            history=tuple(_move(row) for row in content["history"]),
            issued=tuple(_checked(version) for version in content["issued"]),
            removed=tuple(_checked(version) for version in content["removed"]),
        )
        if book.champions()[-1:] != ([book.champion] if book.champion else []):
            raise ValueError(f"the champion is {book.champion}, but its history ends with {book.champions()[-1:]}")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, NameRefused) as error:
        raise Damaged(f"{path} does not have the form of aliases ({error!r}). Restore it from a copy.") from error
    return book


def write_book(path: Path, book: AliasState) -> None:
    """Replace aliases.json as a whole. Raises DiskFull; the old book then stays."""
    content: dict[str, Any] = {"format": _FORMAT} | dataclasses.asdict(book)
    content["history"] = [row | {"at": row["at"].isoformat()} for row in content["history"]]
    write_json(path, content)


def _checked(version: str) -> str:
    if not is_stamp(version):
        raise ValueError(f"{version!r} is not a version id")
    return version


def _move(row: dict[str, Any]) -> AliasMove:
    if row["action"] not in get_args(Action):
        raise ValueError(f"there is no action {row['action']!r}")
    if row["after"] is not None:
        _checked(row["after"])
    return AliasMove(**row | {"at": datetime.fromisoformat(row["at"])})
