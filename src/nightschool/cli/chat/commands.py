"""The commands that can be typed into a conversation: one table, one entry a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from nightschool.cli.chat.backends import NO_MEMORY
from nightschool.cli.chat.conversation import Chat, Correction
from nightschool.cli.chat.params import SETTINGS
from nightschool.cli.chat.remembering import fact_of
from nightschool.cli.memory.shown_why import found_lines, word_lines
from nightschool.data.example import Message
from nightschool.errors import UsageError
from nightschool.feedback.pins import Pins
from nightschool.store.names import parse_ref


class Leave(Exception):
    """The conversation is over."""


class Command(NamedTuple):
    """What a command takes after its name, one line of help, and what it does: True if an answer should follow."""

    argument: str
    help: str
    run: Callable[[Chat, str], bool | None]


def run_command(chat: Chat, line: str) -> bool:
    """Do what a line that begins with `/` says. True if an answer should follow.

    Raises:
        UsageError: If there is no such command, or it lacks something.
        Leave: If the user wants to go.
    """
    word, _, rest = line[1:].strip().partition(" ")
    command = COMMANDS.get(ALIASES.get(word, word))
    if command is None:
        raise UsageError(f"Unknown command: /{word}. /help lists those that there are.")
    return bool(command.run(chat, rest.strip()))


def _help(chat: Chat, _rest: str) -> None:
    usages = {f"/{name} {command.argument}": command.help for name, command in COMMANDS.items()}
    chat.say("\n".join(f"{usage:<17} {text}" for usage, text in usages.items()))


def _clear(chat: Chat, _rest: str) -> None:
    chat.start_over(system=chat.system)
    chat.say("Conversation history cleared.")


def _exit(_chat: Chat, _rest: str) -> None:
    raise Leave


def _params(chat: Chat, rest: str) -> None:
    for pair in rest.split():
        name, _, value = pair.partition("=")
        chat.params = chat.params.with_value(name, value)
    chat.say(" ".join(f"{name}={chat.params.shown(name)}" for name in SETTINGS))


def _set(name: str, chat: Chat, rest: str) -> None:
    if rest:
        chat.params = chat.params.with_value(name, rest)
    label = SETTINGS[name].label.capitalize()
    chat.say(f"{label} {'set to' if rest else 'is'} {chat.params.shown(name)}")


def _switch(mode: str, chat: Chat, rest: str) -> None:
    if rest:
        raise UsageError(f"/{mode} takes nothing. Write /{mode}, and what you ask on the next line.")
    chat.mode = mode
    chat.say(f"Switched to {mode} mode")


def _model(chat: Chat, rest: str) -> None:
    if rest:
        chat.backend.switch(rest)
        chat.show_all()
    chat.say(chat.backend.model)


def _system(chat: Chat, rest: str) -> None:
    chat.system = rest or None
    chat.say(f"system: {rest}" if rest else "No system message.")


def _retry(chat: Chat, _rest: str) -> bool:
    if not chat.turns or chat.turns[-1].role != "user":  # one that was never answered is asked again as it is
        chat.exchange()
        chat.turns.pop()
    return True


def _undo(chat: Chat, _rest: str) -> None:
    question, _ = chat.exchange()
    chat.start_over(chat.turns[:-2], chat.system)
    chat.say(f"Took back: {question.content}")


def _save(chat: Chat, rest: str) -> None:
    if not rest:
        raise UsageError("/save needs a file. Write /save chats.jsonl.")
    chat.exchange()
    turns = chat.messages()
    row = {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}
    try:
        with Path(rest).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"{rest} cannot be written: {error.strerror}. Name another file.") from None
    chat.say(f"Appended {len(turns)} turns to {rest}: data that nightschool train reads.")


def _load(chat: Chat, rest: str) -> None:
    if not rest:
        raise UsageError("/load needs a file. Write /load chats.jsonl.")
    from nightschool.data.sources.load import read_into
    from nightschool.data.sources.problems import Problems

    problems = Problems()
    read = read_into(Path(rest).expanduser(), "auto", Path.cwd(), problems)
    problems.check()
    conversations = [example.messages for example in read.examples if example.messages]
    if not conversations:
        raise UsageError(f"{rest} has no conversation. /save writes one.")
    turns = list(conversations[-1])
    system = turns.pop(0).content if turns[0].role == "system" else None
    chat.start_over(turns, system)
    chat.say(f"Loaded {len(conversations[-1])} turns, the last conversation of {rest}.")


def _mark(rating: Literal["good", "bad"], chat: Chat, _rest: str) -> None:
    chat.backend.feedback(chat.reply().request_id, rating, None)
    chat.say(f"Marked as {rating}.")


def _fix(chat: Chat, rest: str) -> None:
    if not rest:
        raise UsageError("/fix needs the right answer. Write /fix The right answer.")
    reply = chat.reply()
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
    reply = chat.reply()
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
    reply = chat.reply()
    told = chat.backend.why(reply)
    lines = [*found_lines(told.memory, told.tokens), "", *word_lines(told.tokens)]
    if told.text != reply.text:
        lines.insert(0, f"Asked again, it said something else, which this is told of: {told.text}")
    data = {"request_id": reply.request_id, "answer": told.text, "memory": told.memory, "why": told.tokens}
    chat.show(data, "\n".join(lines))


def _pin(chat: Chat, _rest: str) -> None:
    question, given = chat.exchange()
    name = parse_ref(chat.backend.model).name
    pin = Pins(chat.home.database).add(name, question.content, given.content)
    chat.say(f"Pinned for {name} as {pin.id}: every candidate must keep this answer.")


COMMANDS = {
    "help": Command("", "List the commands.", _help),
    "clear": Command("", "Start a new conversation; the system message stays.", _clear),
    "exit": Command("", "Leave, as /bye and /quit do.", _exit),
    "params": Command("[k=v …]", "Show or set all that says how answers are drawn.", _params),
    "temp": Command(
        "[X]", "Set the temperature: 0 is greedy, 0.7 balanced, above 1 wild.", partial(_set, "temperature")
    ),
    "top-p": Command(
        "[X]", "Draw from the likeliest tokens that together have this probability.", partial(_set, "top_p")
    ),
    "top-k": Command("[N]", "Draw from this many likeliest tokens; 0 from all.", partial(_set, "top_k")),
    "max": Command("[N]", "Set the longest answer, in tokens.", partial(_set, "max_new_tokens")),
    "code": Command("", "From now on each line is a task to write code for.", partial(_switch, "code")),
    "chat": Command("", "From now on each line is sent as it is.", partial(_switch, "chat")),
    "model": Command("[MODEL]", "Show who answers, or switch to another model.", _model),
    "system": Command("[TEXT]", "Set the system message, or remove it.", _system),
    "retry": Command("", "Answer the last question again.", _retry),
    "undo": Command("", "Take the last question and its answer back.", _undo),
    "save": Command("FILE", "Append the conversation to a JSONL file that can be trained.", _save),
    "load": Command("FILE", "Go on with the last conversation of a file, such as /save wrote.", _load),
    "good": Command("", "Mark the answer as good.", partial(_mark, "good")),
    "bad": Command("", "Mark the answer as bad.", partial(_mark, "bad")),
    "fix": Command(
        "TEXT", "Say what the answer should have been: to be remembered now, or learned in a later night.", _fix
    ),
    "remember": Command(
        "[FACT]", "Write a fact, or what /fix corrected, into the memory; it counts at once.", _remember
    ),
    "study": Command("", "Keep what /fix corrected, for a later night that learns it.", _study),
    "why": Command(
        "", "Show which entries of the memory the answer came from, and what it would be without them.", _why
    ),
    "pin": Command("", "Pin the answer: the gate refuses candidates that lose it.", _pin),
}
ALIASES = {"?": "help", "bye": "exit", "quit": "exit", "q": "exit", "new": "clear", "temperature": "temp"}
