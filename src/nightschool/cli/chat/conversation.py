"""A conversation: its turns, who answers them and how, and what the model still sees of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from nightschool.cli.chat.backends import Backend, ContextFull, Reply
from nightschool.cli.chat.modes import MODES
from nightschool.cli.chat.params import Params
from nightschool.data.example import Message
from nightschool.errors import UsageError
from nightschool.store.home import Home


@dataclass(frozen=True)
class Correction:
    """What the last answer should have been, and the fact that follows from it; None where no rule tells one."""

    request_id: str
    text: str
    fact: str | None


class Chat:
    """The turns so far, who answers, and how.

    `mode` names what a typed line becomes (`MODES`). The first `num_left_out` of `turns` are no longer shown to the model,
    because its context is full; what is saved has them all.

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
        self.mode = "chat"
        self.correction: Correction | None = None
        self.system: str | None = None
        self.turns: list[Message] = []
        self.num_left_out = 0
        self.last: Reply | None = None

    def messages(self) -> list[Message]:
        """The whole conversation."""
        return [*self._system_turn(), *self.turns]

    def ask(self, text: str) -> None:
        """Add a user's turn. A turn that was never answered is replaced."""
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()
        self.turns.append(Message("user", MODES[self.mode](text)))

    def answer(self) -> Generator[str]:
        """Yield the answer to the last turn. What has come becomes a turn, also when the iterator is closed.

        Where the context has no room for all, the oldest questions with their answers are left out, and the person is told.

        Raises:
            ContextFull: If there is no room for the last turn alone.
        """
        self.last = reply = Reply()
        self.correction = None
        try:
            yield from self._fitting(reply)
        finally:
            if reply.text:
                self.turns.append(Message("assistant", reply.text))

    def _fitting(self, reply: Reply) -> Generator[str]:
        before, shorten = self.num_left_out, False
        while True:
            shown = [*self._system_turn(), *self.turns[self.num_left_out :]]
            pieces = self.backend.stream(shown, self.params, reply, shorten=shorten)
            with closing(pieces):
                try:
                    first = next(pieces, "")
                except ContextFull:
                    if shorten:
                        raise
                    following = self._next_question()
                    shorten, self.num_left_out = following is None, following or self.num_left_out
                    continue
                self._tell_what_gave_way(self.num_left_out - before, shortened=shorten)
                yield first
                yield from pieces
                return

    def _next_question(self) -> int | None:
        """Where the second question that is still shown stands; None if there is one alone."""
        places = range(self.num_left_out + 1, len(self.turns))
        return next((place for place in places if self.turns[place].role == "user"), None)

    def _tell_what_gave_way(self, num_turns: int, *, shortened: bool) -> None:
        if num_turns:
            self.say(
                f"The context is full: the model no longer sees the oldest {self.num_left_out} turns ({num_turns} more than "
                "before). /clear starts anew, a smaller /max leaves more room."
            )
        if shortened:
            self.say(
                f"The context has no room for an answer of {self.params.max_new_tokens} tokens: this one ends where the context does."
            )

    def start_over(self, turns: Sequence[Message] = (), system: str | None = None) -> None:
        """Go on from these turns in place of those so far."""
        self.turns, self.system = list(turns), system
        self.forget_reply()
        self.show_all()

    def forget_reply(self) -> None:
        """Nothing can be marked until something else was answered."""
        self.last = self.correction = None

    def show_all(self) -> None:
        """Show the model all turns again, as far as its context goes."""
        self.num_left_out = 0

    def exchange(self) -> tuple[Message, Message]:
        """The last question and its answer.

        Raises:
            UsageError: If nothing was answered yet.
        """
        if len(self.turns) < 2 or self.turns[-1].role != "assistant":
            raise UsageError("There is no answer yet. Ask something first.")
        return self.turns[-2], self.turns[-1]

    def reply(self) -> Reply:
        """The last answer as it came, which can be marked and explained.

        Raises:
            UsageError: If nothing was answered yet.
        """
        self.exchange()
        if self.last is None:
            raise UsageError("The last answer is not one of this conversation. Ask something first.")
        return self.last

    @property
    def memory(self) -> str | None:
        """The memory that a correction can be written into: the one that was named, or that the last answer read."""
        if self._memory is not None or self.last is None or self.last.memory is None:
            return self._memory
        return str(self.last.memory["name"])

    def _system_turn(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []
