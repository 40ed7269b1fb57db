"""What holds for the whole command: `--json`, `-q`, and how answers, tables and questions reach the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from nightschool.errors import UsageError
from nightschool.units import printable

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
# A column is a key of the rows, or is made from a row.
Column = str | Callable[[Row], object]
Columns = Mapping[str, Column]


@dataclass(frozen=True)
class Session:
    """`json`: stdout carries one JSON value and nothing else. `quiet`: only ids and what was asked for."""

    json: bool = False
    quiet: bool = False


CURRENT: ContextVar[Session | None] = ContextVar("session", default=None)


def session() -> Session:
    """The session of the command that is running; outside of one, the plain one."""
    return CURRENT.get() or Session()


def who() -> str:
    """Who types, for what is written down about who did what."""
    return os.environ.get("USER") or "user"


def answer(data: Any, text: Callable[[], str] | str, *, quiet: Callable[[], str] | str | None = None) -> None:
    """Print the answer of a verb: `data` with `--json`, `quiet` with `-q` where there is one, else `text`."""
    current = session()
    if current.json:
        print_json(data)
        return
    chosen = quiet if current.quiet and quiet is not None else text
    shown = chosen if isinstance(chosen, str) else chosen()
    if shown:
        print(printable(shown, colours=True))


def print_json(data: Any) -> None:
    """One JSON value on stdout, indented for a person who looks; moments are written by ISO 8601."""

    def plain(value: object) -> str:
        return value.isoformat() if isinstance(value, datetime) else str(value)

    print(json.dumps(data, indent=2, ensure_ascii=False, default=plain))


def note(text: str) -> None:
    """Say something beside the answer: on stderr, and not with `-q` or `--json`."""
    current = session()
    if not (current.json or current.quiet):
        print(printable(text), file=sys.stderr)


def colour_wanted() -> bool:
    """Colour where a person looks, unless NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not session().json


def let_children_colour() -> None:
    """Tell the processes that we start, whose output goes through a file, that a person looks at it here."""
    if colour_wanted():
        os.environ.setdefault("FORCE_COLOR", "1")


def rendered(draw: Callable[[Console], None]) -> str:
    """What `draw` prints on a console of rich, in colour where it is wanted."""
    from rich.console import Console

    console = Console(no_color=not colour_wanted(), highlight=False)
    with console.capture() as captured:
        draw(console)
    return captured.get().rstrip()


def bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour_wanted() else text


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, never cut: what is piped elsewhere must be whole. None is shown as `-`."""
    cells = [["-" if value is None else str(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    lines = [
        "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip() for line in cells
    ]
    head = "  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip()
    return "\n".join([bold(head), *lines])


def answer_rows(rows: Sequence[Row], columns: Columns, *, none: str, quiet: Column) -> None:
    """Print rows as a table; `none` says that there are none, and how to get some. -q prints `quiet`, a line a row."""

    def cell(row: Row, column: Column) -> object:
        return row[column] if isinstance(column, str) else column(row)

    answer(
        rows,
        lambda: table(list(columns), [[cell(row, one) for one in columns.values()] for row in rows]) if rows else none,
        quiet=lambda: "\n".join(str(cell(row, quiet)) for row in rows),
    )


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is destroyed.

    Raises:
        UsageError: If the answer is no, or nobody can be asked and `--yes` was not given.
    """
    if yes:
        return
    if session().json or not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody can be asked here. Add --yes to go on.")
    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("The answer was no; nothing was changed. Answer y, or add --yes.")
