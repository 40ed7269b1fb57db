"""`nightschool chat` and `nightschool ask`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nightschool.cli.chat.backends import Backend, LocalBackend, Params, Reply, ServerBackend
from nightschool.cli.chat.commands import COMMANDS, Chat, Leave, run_command
from nightschool.cli.output import answer, bold, note, session
from nightschool.data.example import Message
from nightschool.errors import NightschoolError, UsageError
from nightschool.store.home import Home
from nightschool.units import printable

if TYPE_CHECKING:
    from nightschool.engine.recall import MemoryChoice

DEFAULT_MODEL = "default"


def chat(
    model: str | None = None,
    /,
    *,
    url: str | None = None,
    record: bool = False,
    memory: str | None = None,
    overlay: str | None = None,
    memory_read: Literal["layers", "prompt", "off"] | None = None,
    system: str | None = None,
    temperature: Annotated[float, Parameter(name=["--temperature", "-t"])] = 0.7,
    top_p: float = 0.9,
    max_new_tokens: int = 256,
    seed: int | None = None,
) -> int:
    """Talk with a model. /help lists what can be typed; Ctrl-C stops an answer, and again leaves.

    Reads lines from a pipe as well. With --json every answer is one JSON object on a line.

    Args:
        model: NAME (its champion), NAME@VERSION, a folder, a GGUF file or a hub id; with --url a served name.
        url: Ask a running server in place of loading the model here, as http://127.0.0.1:8001.
        record: Keep the answers in the home, so that /good, /bad and /fix can mark them for a later night.
        memory: An explicit memory that answers read, and that /remember writes to; see nightschool memory.
        overlay: Another memory that lies over it: what it says or takes back hides what is beneath, and /remember writes to it.
        memory_read: How: layers lets the model's own layers read the entries, prompt puts them before the question, off reads
            nothing; without it, layers where the model was trained by method: memory.
        system: A system message.
        temperature: 0 always takes the likeliest token; 1 draws as the model says.
        top_p: Draw from the likeliest tokens that together have this probability.
        max_new_tokens: Longest answer in tokens.
        seed: Draw the same way each time.
    """
    params = _params(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    home = Home.find()
    choice = _choice(memory, overlay, memory_read)
    with closing(_backend(home, model, url, record=record, memory=choice)) as backend:
        state = Chat(home, backend, params, say=_say, show=_show, memory=overlay or memory)
        if system is not None:
            state.system = system
        note(f"{bold(backend.model)}. /help lists commands, /exit leaves." + (" Answers are kept." if record else ""))
        return _converse(state)


def ask(
    question: str | None = None,
    /,
    *,
    model: Annotated[list[str] | None, Parameter(name=["--model", "-m"])] = None,
    url: str | None = None,
    system: str | None = None,
    temperature: Annotated[float, Parameter(name=["--temperature", "-t"])] = 0.0,
    top_p: float = 0.9,
    max_new_tokens: int = 256,
    seed: int | None = None,
) -> None:
    """Ask one question and print the answer. Greedy unless --temperature says otherwise.

    Args:
        question: The question; without it, it is read from stdin.
        model: NAME (its champion), NAME@VERSION, a folder, a GGUF file or a hub id. Several are asked one after another.
        url: Ask a running server in place of loading the model here.
        system: A system message.
        temperature: 0 always takes the likeliest token.
        top_p: Draw from the likeliest tokens that together have this probability.
        max_new_tokens: Longest answer in tokens.
        seed: Draw the same way each time.
    """
    params = _params(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
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


def _params(**values: float | None) -> Params:
    params = Params()
    for name, value in values.items():
        if value is not None:
            params = params.with_value(name, f"{value}")
    return params


def _choice(
    memory: str | None, overlay: str | None, read: Literal["layers", "prompt", "off"] | None
) -> MemoryChoice | None:
    if memory is None and overlay is None and read is None:
        return None
    from nightschool.engine.recall import MemoryChoice

    return MemoryChoice(memory, read, overlay)


def _backend(
    home: Home, model: str | None, url: str | None, *, record: bool, memory: MemoryChoice | None = None
) -> Backend:
    if url is not None:
        if record:
            raise UsageError("--record keeps answers of a model in this process; a server is told when it starts.")
        return ServerBackend(url, model, memory)
    return LocalBackend(home, model or DEFAULT_MODEL, record=record, memory=memory)


def _say(text: str) -> None:
    """What a command has to say: on stdout where a person talks, beside the answers with --json."""
    print(printable(text), file=sys.stderr if session().json else sys.stdout, flush=True)


def _show(data: dict[str, Any], text: str) -> None:
    """What programs want to have as well: one object on a line with --json, else words."""
    if session().json:
        print(json.dumps(data, ensure_ascii=False), flush=True)
    else:
        _say(text)


def _converse(chat: Chat) -> int:
    """Read lines until the end of input, /exit, or Ctrl-C twice."""
    stopped_before = False
    read = _reader(chat)
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if stopped_before:
                return 0
            stopped_before = True
            _say("Ctrl-C again, or /exit, leaves.")
            continue
        except EOFError:
            return 0
        stopped_before = False
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                pending = run_command(chat, line)
            else:
                chat.ask(line)
                pending = True
            if pending:
                stopped_before = not _answer(chat)
        except Leave:
            return 0
        except NightschoolError as error:
            _say(f"error: {error}")


def _answer(chat: Chat) -> bool:
    """Print the answer as it comes. False if Ctrl-C stopped it; what was said until then stays."""
    pieces = chat.answer()
    whole = True
    live = not session().json
    try:
        for piece in pieces:
            if live:
                print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        whole = False
    finally:
        pieces.close()
    reply = chat.last
    assert reply is not None, "an answer leaves a reply"
    if live:
        print("" if whole else " [stopped]", flush=True)
    else:
        row = {
            "request_id": reply.request_id,
            "version": reply.version,
            "answer": reply.text,
            "finish_reason": reply.finish_reason if whole else "cancelled",
        } | ({} if reply.memory is None else {"memory": reply.memory})
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return whole


def _reader(chat: Chat) -> Callable[[], str]:
    """How the next line comes: edited, with history and completion, or plainly from a pipe."""
    if not sys.stdin.isatty():
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    chat.home.path.mkdir(parents=True, exist_ok=True)
    words = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    prompt: PromptSession[str] = PromptSession(
        history=FileHistory(str(chat.home.path / "chat_history")), completer=words, complete_while_typing=False
    )
    return lambda: prompt.prompt("> ", reserve_space_for_menu=4)
