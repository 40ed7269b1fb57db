"""Who answers in a chat: a model in this process, or a server that speaks the OpenAI API."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nightschool.cli.chat.params import Params
from nightschool.cli.chat.remembering import Remembered
from nightschool.data.example import Message
from nightschool.errors import UsageError

NO_MEMORY = "The last answer read no memory, so all of it is from the weights. Start with nightschool chat --memory NAME to read one."


class ContextFull(UsageError):
    """The conversation and the longest answer to it do not fit the context of the model."""


@dataclass
class Reply:
    """One answer while it comes. The fields other than `text` are known when it has come to its end.

    `memory` is what was read for it: the memory's name and revision, `layers` or `prompt`, and the entries; None if nothing was.
    """

    request_id: str = ""
    version: str = ""
    finish_reason: str | None = None
    parts: list[str] = field(default_factory=list)
    memory: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True)
class Why:
    """What each token of an answer was read from, and what was read. `text` is the answer that this is told of."""

    text: str
    memory: dict[str, Any]
    tokens: list[dict[str, Any]]


class Backend(Protocol):
    """Answers, and takes what people think of answers; these members are all of it."""

    model: str

    def stream(
        self, messages: Sequence[Message], params: Params, reply: Reply, *, shorten: bool = False
    ) -> Generator[str]:
        """Yield the answer in pieces and fill `reply`. Closing the generator stops the answer.

        Raises:
            ContextFull: Before the first piece, if the context has no room for what is asked and its longest answer; with
                `shorten`, which lets the answer be shorter, for one token of it.
        """

    def feedback(self, request_id: str, rating: Literal["good", "bad"], correction: str | None) -> None:
        """Mark an answer."""

    def why(self, reply: Reply) -> Why:
        """Where the last answer came from. Raises UsageError if it read no memory."""

    def remember(self, memory: str, text: str, source: str) -> Remembered:
        """Write a fact into a memory; it counts for the next question."""

    def switch(self, model: str) -> None:
        """Answer with another model from now on."""

    def close(self) -> None:
        """Free what was loaded."""
