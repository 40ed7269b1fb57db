"""A model in this process that answers a chat."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal

from nightschool.cli.chat.backends import NO_MEMORY, ContextFull, Reply, Why
from nightschool.cli.chat.params import SETTINGS, Params
from nightschool.cli.chat.remembering import Remembered, remember_here
from nightschool.data.example import Message
from nightschool.errors import NameRefused, NightschoolError, PromptTooLong, UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.store.home import Home
from nightschool.store.names import parse_ref

if TYPE_CHECKING:
    from nightschool.engine.local_model import Asked, LocalModel
    from nightschool.engine.recall import MemoryChoice

LOCAL = "local"


class LocalBackend:
    """A model in this process. With `record`, answers are kept in the home, so that they can be marked."""

    def __init__(
        self,
        home: Home,
        model: str,
        *,
        record: bool,
        memory: MemoryChoice | None = None,
        experts_resident: int | None = None,
    ) -> None:
        self._home = home
        self._memory, self._experts_resident = memory, experts_resident
        self._asked: tuple[str, Asked] | None = None
        self._loaded: LocalModel | None = None
        self._conversations = ConversationStore(home.database) if record else None
        self.model = model
        self.switch(model)

    def stream(
        self, messages: Sequence[Message], params: Params, reply: Reply, *, shorten: bool = False
    ) -> Generator[str]:
        from nightschool.engine.request import SamplingParams

        assert self._loaded is not None, "switch loaded a model"
        sampling = SamplingParams(**{name: getattr(params, name) for name in SETTINGS})
        reply.request_id = f"chat-{uuid.uuid4().hex}"
        reply.version = self._loaded.ref
        try:
            asked = self._loaded.begin(reply.request_id, messages, sampling, shorten=shorten)
        except PromptTooLong as error:
            raise ContextFull(str(error)) from None
        handle, self._asked = asked.handle, (reply.request_id, asked)
        reply.memory = None if asked.found is None else asked.found.to_json()
        try:
            for chunk in handle.chunks():
                if chunk.error is not None:
                    raise NightschoolError(f"The answer ended early: {chunk.error}")
                reply.finish_reason = chunk.finish_reason
                if chunk.text:
                    reply.parts.append(chunk.text)
                    yield chunk.text
        finally:
            handle.cancel()
            self._record(messages, reply)

    def feedback(self, request_id: str, rating: Literal["good", "bad"], correction: str | None) -> None:
        if self._conversations is None:
            raise UsageError("Answers are not kept here, so you cannot mark one. Start with nightschool chat --record.")
        self._conversations.feedback(request_id, rating, correction)

    def why(self, reply: Reply) -> Why:
        from nightschool.engine.why import reasons_of

        if self._loaded is None or self._asked is None or self._asked[0] != reply.request_id or reply.memory is None:
            raise UsageError(NO_MEMORY)
        asked = self._asked[1]
        answer_ids = [token for chunk in asked.handle.chunks() for token in chunk.token_ids]
        return Why(reply.text, reply.memory, reasons_of(self._loaded, asked, answer_ids))

    def remember(self, memory: str, text: str, source: str) -> Remembered:
        return remember_here(self._home, memory, text, source)

    def switch(self, model: str) -> None:
        from nightschool.engine.local_model import LocalModel

        # The new one first: if it cannot be loaded, the old one goes on answering.
        loaded = LocalModel(self._home, model, memory=self._memory, experts_resident=self._experts_resident)
        try:
            _ = loaded.reads
        except BaseException:
            loaded.close()
            raise
        self.close()
        self._loaded, self.model = loaded, model

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    def _record(self, messages: Sequence[Message], reply: Reply) -> None:
        if self._conversations is None or not reply.text:
            return
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        name, version = _name_and_version(self.model, reply.version)
        self._conversations.record(reply.request_id, name, version, turns, reply.text)


def _name_and_version(model: str, answered: str) -> tuple[str, str]:
    """What is kept of who answered: a served name and a version id, as a server keeps them.

    What was loaded from a folder or the hub has neither, and is kept as `local` with where it came from.
    """
    try:
        parse_ref(model)
        ref = parse_ref(answered)
    except NameRefused:
        return LOCAL, answered
    return (LOCAL, answered) if ref.version is None else (ref.name, ref.version)
