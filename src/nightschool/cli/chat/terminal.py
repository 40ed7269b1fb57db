"""How a chat reads lines and writes answers: with editing and history where a person types, plainly from and into a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from nightschool.cli.chat.backends import Reply
from nightschool.cli.chat.commands import COMMANDS
from nightschool.cli.output import session
from nightschool.store.home import Home
from nightschool.units import printable

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History


class Terminal:
    """Where a person talks, or a program.

    Args:
        home: Where the lines that were typed are kept, for the next time.
    """

    def __init__(self, home: Home) -> None:
        self._session = _edited(home) if sys.stdin.isatty() else None

    def read(self, mode: str) -> str:
        """The next line.

        Raises:
            EOFError: If there is none.
            KeyboardInterrupt: After Ctrl-C.
        """
        if self._session is None:
            return input()
        return self._session.prompt("You: " if mode == "chat" else f"You ({mode}): ", reserve_space_for_menu=4)

    def say(self, text: str) -> None:
        """What a command has to say: on stdout where a person talks, beside the answers with --json."""
        print(printable(text), file=sys.stderr if session().json else sys.stdout, flush=True)

    def show(self, data: dict[str, Any], text: str) -> None:
        """What programs want to have as well: one object on a line with --json, else words."""
        if session().json:
            print(json.dumps(data, ensure_ascii=False), flush=True)
        else:
            self.say(text)

    def write(self, pieces: Generator[str]) -> bool:
        """Write an answer as it comes, where it is not for a program. False if Ctrl-C stopped it."""
        begun, whole, live = False, True, not session().json
        try:
            for piece in pieces:
                if live:
                    label = "" if begun or self._session is None else "Assistant: "
                    print(f"{label}{printable(piece)}", end="", flush=True)
                begun = True
        except KeyboardInterrupt:
            whole = False
        finally:
            pieces.close()
            if live and (begun or not whole):
                print("" if whole else " [stopped]" if begun else "[stopped]", flush=True)
        return whole

    def finish(self, reply: Reply, *, whole: bool, num_left_out: int) -> None:
        """Write what a program gets of an answer: one object on a line."""
        if not session().json:
            return
        row: dict[str, Any] = {
            "request_id": reply.request_id,
            "version": reply.version,
            "answer": reply.text,
            "finish_reason": reply.finish_reason if whole else "cancelled",
        }
        if reply.memory is not None:
            row["memory"] = reply.memory
        if num_left_out:
            row["turns_left_out"] = num_left_out
        print(json.dumps(row, ensure_ascii=False), flush=True)


def _edited(home: Home) -> PromptSession[str]:
    """Lines with editing, completion of commands, and those typed before."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    words = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    return PromptSession(history=_history(home), completer=words, complete_while_typing=False)


def _history(home: Home) -> History:
    """The lines typed before, kept in the home; of this conversation alone where nothing can be written there."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = home.path / "chat_history"
    try:
        home.path.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()
