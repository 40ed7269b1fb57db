"""A conversation, and the commands that can be typed into it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nightschool.cli.chat.backends import NO_MEMORY, Backend, Params, Reply
from nightschool.cli.chat.remembering import fact_of
from nightschool.cli.memory.shown_why import found_lines, word_lines
from nightschool.data.example import Message
from nightschool.errors import UsageError
from nightschool.feedback.pins import Pins
from nightschool.store.home import Home
from nightschool.store.names import parse_ref


class Leave(Exception):
    """The conversation is over."""


class Chat:
    """The turns so far, who answers, and how.

    Args:
        home: Where pins go.
        backend: Who answers.
        params: How answers are drawn.
        say: Tells the person something.
        show: Tells a program something, the person the same in words.
        memory: The memory that the person named, to read and to write.
    """

    def __init__(
        self,
        home: Home,
        backend: Backend,
        params: Params,
        *,
        say: Callable[[str], None],
        show: Callable[[dict[str, Any], str], None],
        memory: str | None = None,
    ) -> None:
        self.home = home
        self.backend = backend
        self.params = params
        self.say = say
        self.show = show
        self._memory = memory
        self.correction: Correction | None = None
        self.system: str | None = None
        self.turns: list[Message] = []
        self.last: Reply | None = None

    @property
    def messages(self) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def ask(self, text: str) -> None:
        """Add a user's turn. A turn that was never answered is replaced."""
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()
        self.turns.append(Message("user", text))

    def answer(self) -> Generator[str]:
        """Yield the answer to the last turn. What has come becomes a turn, also when the iterator is closed."""
        self.last = reply = Reply()
        self.correction = None
        pieces = self.backend.stream(self.messages, self.params, reply)
        try:
            yield from pieces
        finally:
            if reply.text:
                self.turns.append(Message("assistant", reply.text))

    def answered(self) -> tuple[Message, Message, Reply]:
        """The last question, its answer, and the reply.

        Raises:
            UsageError: If nothing was answered yet.
        """
        if self.last is None or len(self.turns) < 2 or self.turns[-1].role != "assistant":
            raise UsageError("There is no answer yet. Ask something first.")
        return self.turns[-2], self.turns[-1], self.last

    @property
    def memory(self) -> str | None:
        """The memory that a correction can be written into: the one that was named, or that the last answer read."""
        if self._memory is not None or self.last is None or self.last.memory is None:
            return self._memory
        return str(self.last.memory["name"])


@dataclass(frozen=True)
class Correction:
    """What the last answer should have been, and the fact that follows from it; None where no rule tells one."""

    request_id: str
    text: str
    fact: str | None


# True if an answer should follow.
Command = Callable[[Chat, str], bool | None]


def run_command(chat: Chat, line: str) -> bool:
    """Do what a line that begins with `/` says. True if an answer should follow.

    Raises:
        UsageError: If there is no such command, or it lacks something.
        Leave: If the user wants to go.
    """
    word, _, rest = line[1:].strip().partition(" ")
    command = COMMANDS.get(ALIASES.get(word, word))
    if command is None:
        raise UsageError(f"There is no command /{word}. /help lists them.")
    return bool(command[0](chat, rest.strip()))


def _help(chat: Chat, _rest: str) -> None:
    chat.say("\n".join(f"/{usage:<16} {text}" for _, usage, text in COMMANDS.values()))


def _clear(chat: Chat, _rest: str) -> None:
    chat.turns.clear()
    chat.last = None
    chat.say("Starting a new conversation.")


def _exit(_chat: Chat, _rest: str) -> None:
    raise Leave


def _params(chat: Chat, rest: str) -> None:
    for pair in rest.split():
        name, _, value = pair.partition("=")
        chat.params = chat.params.with_value(name, value)
    chat.say(" ".join(f"{name}={value}" for name, value in dataclasses.asdict(chat.params).items()))


def _temperature(chat: Chat, rest: str) -> None:
    if rest:
        chat.params = chat.params.with_value("temperature", rest)
    chat.say(f"temperature={chat.params.temperature:g}")


def _model(chat: Chat, rest: str) -> None:
    if rest:
        chat.backend.switch(rest)
    chat.say(chat.backend.model)


def _system(chat: Chat, rest: str) -> None:
    chat.system = rest or None
    chat.say(f"system: {rest}" if rest else "No system message.")


def _retry(chat: Chat, _rest: str) -> bool:
    chat.answered()
    chat.turns.pop()
    return True


def _undo(chat: Chat, _rest: str) -> None:
    question, _, _ = chat.answered()
    del chat.turns[-2:]
    chat.last = None
    chat.say(f"Took back: {question.content}")


def _save(chat: Chat, rest: str) -> None:
    if not rest:
        raise UsageError("/save needs a file. Write /save chats.jsonl.")
    chat.answered()
    row = {"messages": [{"role": turn.role, "content": turn.content} for turn in chat.messages]}
    with Path(rest).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    chat.say(f"Appended {len(chat.messages)} turns to {rest}: data that nightschool train reads.")


def _mark(chat: Chat, rating: Literal["good", "bad"]) -> None:
    _, _, reply = chat.answered()
    chat.backend.feedback(reply.request_id, rating, None)
    chat.say(f"Marked as {rating}.")


def _fix(chat: Chat, rest: str) -> None:
    if not rest:
        raise UsageError("/fix needs the right answer. Write /fix The right answer.")
    _, _, reply = chat.answered()
    if chat.memory is None:
        _learn_later(chat, reply.request_id, rest)
        chat.turns[-1] = Message("assistant", rest)
        return
    read = [entry["text"] for entry in (reply.memory or {"entries": []})["entries"]]
    chat.correction = Correction(reply.request_id, rest, fact_of(rest, reply.text, read))
    chat.turns[-1] = Message("assistant", rest)
    fact = chat.correction.fact
    now = (
        f"/remember      {chat.memory} remembers it now: {fact}"
        if fact
        else (f"/remember FACT {chat.memory} remembers it now: say it as a sentence, such as Ada lives in Oslo.")
    )
    chat.say(
        f"Corrected here. Nothing is kept yet:\n{now}\n/study         A night that studies conversations learns it."
    )


def _remember(chat: Chat, rest: str) -> None:
    _, _, reply = chat.answered()
    if chat.memory is None:
        raise UsageError(NO_MEMORY)
    fact = rest or (chat.correction.fact if chat.correction is not None else None)
    if not fact:
        raise UsageError(
            "/remember needs a fact. Write /remember Ada lives in Oslo. or correct an answer first, with /fix."
        )
    done = chat.backend.remember(chat.memory, fact, reply.request_id)
    chat.show({"remembered": done.to_json()}, "\n".join(done.lines()))


def _study(chat: Chat, _rest: str) -> None:
    if chat.correction is None:
        raise UsageError("/study keeps what /fix corrected. Write /fix The right answer. first.")
    _learn_later(chat, chat.correction.request_id, chat.correction.text)


def _learn_later(chat: Chat, request_id: str, correction: str) -> None:
    chat.backend.feedback(request_id, "bad", correction)
    chat.say("Kept as the right answer: a night that studies conversations learns it.")


def _why(chat: Chat, _rest: str) -> None:
    _, _, reply = chat.answered()
    told = chat.backend.why(reply)
    lines = [*found_lines(told.memory, told.tokens), "", *word_lines(told.tokens)]
    if told.text != reply.text:
        lines.insert(0, f"Asked again, it said something else, which this is told of: {told.text}")
    data = {"request_id": reply.request_id, "answer": told.text, "memory": told.memory, "why": told.tokens}
    chat.show(data, "\n".join(lines))


def _pin(chat: Chat, _rest: str) -> None:
    question, given, _ = chat.answered()
    name = parse_ref(chat.backend.model).name
    pin = Pins(chat.home.database).add(name, question.content, given.content)
    chat.say(f"Pinned for {name} as {pin.id}: every candidate must keep this answer.")


# word: (what it does, how it is written, one line of help)
COMMANDS: dict[str, tuple[Command, str, str]] = {
    "help": (_help, "help", "List the commands."),
    "clear": (_clear, "clear", "Start a new conversation."),
    "exit": (_exit, "exit", "Leave, as /bye and /quit do."),
    "params": (_params, "params [k=v …]", "Show or set max_new_tokens, temperature, top_p, seed."),
    "temp": (_temperature, "temp X", "Set the temperature; 0 is greedy."),
    "model": (_model, "model [MODEL]", "Show who answers, or switch to another model."),
    "system": (_system, "system [TEXT]", "Set the system message, or remove it."),
    "retry": (_retry, "retry", "Answer the last question again."),
    "undo": (_undo, "undo", "Take the last question and its answer back."),
    "save": (_save, "save FILE", "Append the conversation to a JSONL file that can be trained."),
    "good": (lambda chat, _: _mark(chat, "good"), "good", "Mark the answer as good."),
    "bad": (lambda chat, _: _mark(chat, "bad"), "bad", "Mark the answer as bad."),
    "fix": (
        _fix,
        "fix TEXT",
        "Say what the answer should have been: to be remembered now, or learned in a later night.",
    ),
    "remember": (
        _remember,
        "remember [FACT]",
        "Write a fact, or what /fix corrected, into the memory; it counts at once.",
    ),
    "study": (_study, "study", "Keep what /fix corrected, for a later night that learns it."),
    "why": (_why, "why", "Show which entries of the memory the answer came from, and what it would be without them."),
    "pin": (_pin, "pin", "Pin the answer: the gate refuses candidates that lose it."),
}
ALIASES = {"?": "help", "bye": "exit", "quit": "exit", "q": "exit", "new": "clear", "temperature": "temp"}
