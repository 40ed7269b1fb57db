"""`nightschool chat` and `nightschool ask`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nightschool.cli.chat.backends import Backend, Reply
from nightschool.cli.chat.commands import Leave, run_command
from nightschool.cli.chat.conversation import Chat
from nightschool.cli.chat.local_backend import LocalBackend
from nightschool.cli.chat.params import GreedyParams, Params
from nightschool.cli.chat.server_backend import ServerBackend
from nightschool.cli.chat.terminal import Terminal
from nightschool.cli.output import answer, bold, note, session
from nightschool.data.example import Message
from nightschool.errors import NightschoolError, UsageError
from nightschool.store.home import Home
from nightschool.units import printable

if TYPE_CHECKING:
    from nightschool.engine.recall import MemoryChoice

DEFAULT_MODEL = "default"
_BALANCED = Params()
_GREEDY = GreedyParams()


def chat(
    model: str | None = None,
    /,
    *,
    url: str | None = None,
    record: bool = False,
    memory: str | None = None,
    overlay: Annotated[list[str] | None, Parameter(negative=())] = None,
    memory_read: Literal["layers", "prompt", "off"] | None = None,
    experts_resident: int | None = None,
    system: str | None = None,
    code: bool = False,
    params: Params = _BALANCED,
) -> int:
    """Talk with a model. /help lists what can be typed; Ctrl-C stops an answer, and again leaves.

    Reads lines from a pipe as well. With --json every answer is one JSON object on a line.

    Args:
        model: NAME (its champion), NAME@VERSION, a folder, a GGUF file or a hub id; with --url a served name.
        url: Ask a running server in place of loading the model here, as http://127.0.0.1:8001.
        record: Keep the answers in the home, so that /good, /bad and /fix can mark them for a later night.
        memory: An explicit memory that answers read, and that /remember writes to; see nightschool memory.
        overlay: Another memory that lies over it: what it says or takes back hides what is beneath, and /remember writes to it. Given
            several times, each lies over those before it.
        memory_read: How: layers lets the model's own layers read the entries, prompt puts them before the question, off reads
            nothing; without it, layers where the model was trained by method: memory.
        experts_resident: So many experts of a mixture are in memory at a time, those that are used most. All of them without it.
        system: A system message.
        code: Begin in code mode, where each line is a task to write code for.
        params: How answers are drawn.
    """
    home = Home.find()
    overlays = tuple(overlay or ())
    choice = _choice(memory, overlays, memory_read)
    with closing(
        _backend(home, model, url, record=record, memory=choice, experts_resident=experts_resident)
    ) as backend:
        terminal = Terminal(home)
        state = Chat(
            home, backend, params, say=terminal.say, show=terminal.show, memory=overlays[-1] if overlays else memory
        )
        state.system, state.mode = system, "code" if code else "chat"
        note(f"{bold(backend.model)}. /help lists commands, /exit leaves." + (" Answers are kept." if record else ""))
        return _converse(state, terminal)


def ask(
    question: str | None = None,
    /,
    *,
    model: Annotated[list[str] | None, Parameter(name=["--model", "-m"])] = None,
    url: str | None = None,
    system: str | None = None,
    params: GreedyParams = _GREEDY,
) -> None:
    """Ask one question and print the answer. Greedy unless --temperature says otherwise.

    Args:
        question: The question; without it, it is read from stdin.
        model: NAME (its champion), NAME@VERSION, a folder, a GGUF file or a hub id. Several are asked one after another.
        url: Ask a running server in place of loading the model here.
        system: A system message.
        params: How the answer is drawn.
    """
    text = question if question is not None else sys.stdin.read().strip()
    if not text:
        raise UsageError("The question is blank. Write nightschool ask 'QUESTION'.")
    turns = [*([Message("system", system)] if system else []), Message("user", text)]
    home = Home.find()
    models: list[str | None] = [*model] if model else [None]
    rows = []
    live = len(models) == 1 and not session().json
    for one in models:
        reply = Reply()
        with closing(_backend(home, one, url, record=False)) as backend:
            for piece in backend.stream(turns, params, reply):
                if live:
                    print(printable(piece), end="", flush=True)
            rows.append({"model": backend.model, "version": reply.version, "answer": reply.text})
    data = {"question": text, "answers": rows} if len(rows) > 1 else {"question": text, **rows[0]}
    if live:
        print()
        return
    answer(data, lambda: "\n\n".join(f"{bold(row['version'] or row['model'])}\n{row['answer']}" for row in rows))


def _choice(
    memory: str | None, overlays: tuple[str, ...], read: Literal["layers", "prompt", "off"] | None
) -> MemoryChoice | None:
    if memory is None and not overlays and read is None:
        return None
    from nightschool.engine.recall import MemoryChoice

    return MemoryChoice(memory, read, overlays)


def _backend(
    home: Home,
    model: str | None,
    url: str | None,
    *,
    record: bool,
    memory: MemoryChoice | None = None,
    experts_resident: int | None = None,
) -> Backend:
    if url is not None:
        if record:
            raise UsageError("--record keeps answers of a model in this process; a server is told when it starts.")
        if experts_resident is not None:
            raise UsageError("--experts-resident is of a model in this process; a server is told when it starts.")
        return ServerBackend(url, model, memory)
    return LocalBackend(home, model or DEFAULT_MODEL, record=record, memory=memory, experts_resident=experts_resident)


def _converse(chat: Chat, terminal: Terminal) -> int:
    """Read lines until the end of input, /exit, or Ctrl-C twice."""
    stopped_before = False
    while True:
        try:
            line = terminal.read(chat.mode)
        except KeyboardInterrupt:
            if stopped_before:
                return 0
            stopped_before = True
            terminal.say("Ctrl-C again, or /exit, leaves.")
            continue
        except EOFError:
            return 0
        stopped_before = False
        if not line.strip():
            continue
        try:
            if not line.startswith("/"):
                chat.ask(line)
            elif not run_command(chat, line):
                continue
            whole = terminal.write(chat.answer())
            assert chat.last is not None, "an answer leaves a reply"
            terminal.finish(chat.last, whole=whole, num_left_out=chat.num_left_out)
            stopped_before = not whole
        except Leave:
            return 0
        except KeyboardInterrupt:  # while a command was at work
            terminal.say("Stopped.")
            stopped_before = True
        except NightschoolError as error:
            terminal.say(f"error: {error}")
